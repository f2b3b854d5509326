"""The adapter alone goes to vLLM, from memory to memory, under a name of its own each time.

vLLM loads adapters from files. Its loader is told to take the tensors at hand for the adapters made here; packing,
slicing for tensor parallelism and the kernels are vLLM's. vLLM keys the blocks of its prefix cache, and with an adapted
vision tower the images' embeddings, by the adapter's name: a fresh name leaves nothing stale to be found.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.sync import lora
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

_NUMBERS = itertools.count(1)
"""Of the adapters of this process: an engine may serve one trainer after another."""


def llm_keys(model: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM` to run this model's adapter, one at a time."""
    keys = {"enable_lora": True, "max_lora_rank": lora.engine_rank(model), "max_loras": 1, "max_cpu_loras": 1}
    return {**keys, "enable_tower_connector_lora": True} if lora.tower_layers(model) else keys


class Adapters:
    """The adapters of one colocated engine; every request of it asks for the one that was sent last."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._manager = llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager
        self._tensors: Mapping[str, Any] = {}
        self._request: Any = None

    def install(self) -> list[Handle]:
        return [
            wrap(AttributeSlot(self._manager, "_load_adapter"), self._load, INNER),
            wrap(AttributeSlot(self._llm, "generate"), self._ask, INNER),
        ]

    def send(self, tensors: Mapping[str, Any]) -> None:
        """Replace the adapter that vLLM holds; ConfigError where it has no place for some of it."""
        from vllm.lora.request import LoRARequest

        engine, number = self._llm.llm_engine, next(_NUMBERS)
        for older in engine.list_loras():
            engine.remove_lora(older)
        self._tensors = tensors
        self._request = LoRARequest(f"policy-{number}", number, "in-memory")
        engine.add_lora(self._request)
        held = self._manager._adapter_manager
        lost = [name for name in held.get_adapter(number).loras if name not in held.modules]
        if lost:
            fix = "Set it to batched, or leave the layer out of peft.target_modules."
            raise ConfigError(f"vLLM takes no adapter on {lost[0]} of this model", where="vllm.weight_sync", fix=fix)

    def _ask(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if self._request is not None:
            kwargs.setdefault("lora_request", self._request)
        return call_next(*args, **kwargs)

    def _load(self, call_next: Next, request: Any, /) -> Any:
        """Make of the tensors at hand what vLLM's `WorkerLoRAManager._load_adapter` makes of a folder."""
        if request != self._request:
            return call_next(request)
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        rank = self._manager.lora_config.max_lora_rank
        mapper = getattr(self._manager._adapter_manager.model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            request.lora_int_id,
            dict(self._tensors),
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a scale of 1: each layer's own is in its tensor
            device=str(self._manager.device),
            dtype=self._manager.lora_config.lora_dtype,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
