"""A trainer's weights on their way to the colocated engine: merged as TRL does it, batched, or the adapter alone.

merged   TRL's: every tensor of the model, the adapter merged in, one `load_weights` call each.
batched  One `load_weights` call, with the tensors that training has changed since the last sync.
adapter  The adapter's own matrices, which vLLM adds on the fly.

The first sync pushes everything, since nobody can tell whether the trainer still has the weights that vLLM read from
the checkpoint; so does the first one after the engine has slept at level 2, which throws weights away. At level 1 they
wait in host memory: what TRL syncs again only because the engine slept needs no push. An engine that has quantized its
weights (transposed, scaled) takes none at all: an adapter is all that it is sent.
"""

import logging
import time
from collections.abc import Container, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.parts import Part, part_of
from grpo_autotune.rollout.sync import adapters, lora
from grpo_autotune.rollout.sync.weights import changing, has_4bit, packed, weights
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

_logger = logging.getLogger("grpo_autotune.rollout")

Way = Literal["merged", "batched", "adapter"]
WHERE = "vllm.weight_sync"
TRL_LEVEL = 2
"""Of sleep, in TRL 1.16."""

SLOW_ON_CPU = "generation with an adapter that is not merged takes vLLM's CPU build about three times as long"
"""It gathers an adapter's matrices anew for every token (`lora/ops/torch_ops`): docs/benchmarks/vllm_sync.json."""


class Sync(NamedTuple):
    """One weight sync."""

    way: Way  # one of `Way`
    seconds: float  # on this process's clock
    bytes: int  # of the tensors handed to vLLM
    tensors: int  # their number
    full: bool  # True if it pushed every weight of the model
    reset: tuple[str, ...]  # the caches that were reset


class WeightSync(Part):
    """The weight syncs of one engine, in this process or at a server."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.way: Way = "merged"
        self.why = ""  # the reason for it; empty where no engine has started, and on ranks that send nothing
        self.syncs: list[Sync] = []  # oldest first


def facts(owner: Any) -> list[Sync]:
    """Every weight sync of a trainer or its `vllm_generation`, oldest first."""
    part = part_of(getattr(owner, "vllm_generation", owner), WeightSync)
    return [] if part is None else list(part.syncs)


def choose(generation: Any, options: EngineOptions) -> tuple[Way, str]:
    """The way for a trainer's weights, and the reason for it; ConfigError where the asked way is not possible, or the
    model's weights are packed in a way that vLLM does not take."""
    model, asked = generation.model, options.weight_sync
    if has_4bit(model):
        _check_4bit(model, options)
    elif (kind := packed(model)) is not None:
        what = f"vLLM takes no weights that are packed in 8 bits ({kind})"
        fix = "Train on a base that is not quantized, or with model.load_in_4bit: true."
        raise ConfigError(what, where="model.name_or_path", fix=fix)
    if asked == "merged" or asked == "batched":
        return asked, "asked for"
    reason = lora.refusal(model)
    if asked == "adapter":
        if reason is not None:
            raise ConfigError(f"vLLM cannot run the adapter: {reason}", where=WHERE, fix="Set it to batched or auto.")
        return asked, "asked for"
    if reason is not None:
        return "batched", f"no adapter can be sent: {reason}"
    if generation.accelerator.device.type == "cpu":
        return "batched", SLOW_ON_CPU
    return "adapter", "the adapter is all that training changes"


def _check_4bit(model: Any, options: EngineOptions) -> None:
    from transformers import PretrainedConfig

    if options.weight_sync == "merged":
        fix = "Set it to auto, adapter or batched."
        raise ConfigError("an adapter merged into 4-bit weights is rounded away", where=WHERE, fix=fix)
    if options.keys.get("quantization") is not None:
        raise ConfigError(
            f"{options.keys['quantization']} layers of vLLM take no weights from the trainer, whose own are in 4 bits",
            where="vllm.quantization",
            fix="Leave it out: the engine then holds the numbers that the 4-bit weights stand for.",
        )
    if "quantization_config" in PretrainedConfig.get_config_dict(model.name_or_path)[0]:  # which vLLM reads
        what = "the checkpoint itself is quantized, and so is the engine that loads it, which takes no weights then"
        fix = "Name the checkpoint that it was made from, with model.load_in_4bit: true."
        raise ConfigError(what, where="model.name_or_path", fix=fix)
    if (reason := lora.unmergeable(model)) is not None:
        what = f"a model in 4 bits trains with vLLM under a plain LoRA adapter only, and {reason}"
        fix = "Train LoRA without DoRA and biases on linear layers, or set model.load_in_4bit to false."
        raise ConfigError(what, where="peft", fix=fix)


def check_quantized(quantization: str | None, way: Way, sleep_level: int) -> None:
    """ConfigError for what an engine whose weights have a quantization cannot do: take weights, and have them thrown
    away in sleep (level 0: it does not sleep)."""
    if quantization is None:
        return
    if way != "adapter":
        what = f"{quantization} layers of vLLM take no weights from the trainer, and weights are sent {way}"
        fix = "Leave it out, or set vllm.weight_sync to adapter and train a LoRA adapter (peft)."
        raise ConfigError(what, where="vllm.quantization", fix=fix)
    if sleep_level == TRL_LEVEL:
        what = f"asleep at level 2 an engine throws its weights away, and {quantization} layers take no new ones"
        raise ConfigError(what, where="vllm.sleep_level", fix="Set it to 1 or 0, or leave vllm.quantization out.")


class ColocateSync(WeightSync):
    """The weight syncs of an engine in this process."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._generation: Any = None
        self._llm: Any = None
        self._adapters: adapters.Adapters | None = None
        self._slept: int | None = None
        self._quantized = False
        self._generating = False
        self._pushed: list[str] = []
        self._bytes = 0

    def llm_keys(self, generation: Any) -> dict[str, Any]:
        """Decide on the way (ConfigError where the asked one is not possible); the arguments of `vllm.LLM` for it."""
        self.way, self.why = choose(generation, self.options)
        check_quantized(self.options.keys.get("quantization"), self.way, self._level(generation))
        keys = adapters.llm_keys(generation.model) if self.way == "adapter" else {}
        # TRL asks for bitsandbytes here; vLLM's 4-bit layers take no pushed weights, so it holds them as numbers
        return {**keys, "quantization": None} if has_4bit(generation.model) else keys

    def _level(self, generation: Any) -> int:
        asked = self.options.sleep_level
        return TRL_LEVEL * bool(generation.enable_sleep_mode) if asked is None else asked

    def started(self, generation: Any, llm: Any) -> list[Handle]:
        """Put layers on sleep and waking, and on what takes adapters; ConfigError where the checkpoint itself is
        quantized, and weights would have to be pushed."""
        quantization = llm.llm_engine.vllm_config.model_config.quantization
        check_quantized(quantization, self.way, self._level(generation))
        self._quantized = quantization is not None
        if self.options.weight_sync == "auto":
            lost = self.way == "batched" and self.why != SLOW_ON_CPU and lora.is_adapted(generation.model)
            log = _logger.warning if lost else _logger.info
            log("vllm.weight_sync: %s, since %s", self.way, self.why)
        self._generation, self._llm = generation, llm
        self._adapters = adapters.Adapters(llm) if self.way == "adapter" else None
        handles = [
            wrap(AttributeSlot(llm, "sleep"), self._sleep, INNER),
            wrap(AttributeSlot(llm, "wake_up"), self._wake_up, INNER),
        ]
        return handles if self._adapters is None else [*handles, *self._adapters.install()]

    def install(self, generation: Any) -> list[Handle]:
        return [
            wrap(AttributeSlot(generation, "sync_weights"), self._sync, INNER),
            wrap(AttributeSlot(generation, "generate"), self._generate, INNER),
            wrap(AttributeSlot(generation, "_iter_named_params"), self._counted, INNER),
        ]

    def _sleep(self, call_next: Next, /, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        level = level if self.options.sleep_level is None else self.options.sleep_level
        if level == 0:
            return None  # idle as it is, with all it holds
        self._slept = max(level, self._slept or 0)
        return call_next(level, *args, **kwargs)

    def _wake_up(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        return None if self.options.sleep_level == 0 else call_next(*args, **kwargs)

    def _generate(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        self._generating = True
        try:
            return call_next(*args, **kwargs)
        finally:
            self._generating = False

    def _sync(self, call_next: Next, /) -> None:
        begun = time.perf_counter()
        self._pushed, self._bytes = [], 0
        full = not self._quantized and (not self.syncs or self._slept == TRL_LEVEL)
        reset: tuple[str, ...] = ()
        if self._generating and self.syncs and not full:
            self._wake()  # within `generate` TRL syncs only because the engine slept
        elif self.way == "merged":
            call_next()
            full = True
            reset = reset_caches(self._llm, self._pushed)
        else:
            self._wake()
            reset = self._push(full)
        self._slept = None
        self.syncs.append(Sync(self.way, time.perf_counter() - begun, self._bytes, len(self._pushed), full, reset))

    def _wake(self) -> None:
        """Wake the engine for weights, as TRL does it before it pushes."""
        if self._generation.enable_sleep_mode:
            from trl.generation.vllm_generation import empty_cache

            empty_cache()
            self._llm.wake_up(tags=["weights"])
            self._generation._llm_weights_sleeping = False

    def _push(self, full: bool) -> tuple[str, ...]:
        reset: tuple[str, ...] = ()
        if full or self.way == "batched":
            model = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
            model.load_weights(self._changed(None if full else changing(self._generation.model)))
            reset = reset_caches(self._llm, self._pushed)
        if self._adapters is not None:
            tensors = lora.tensors(self._generation)
            self._adapters.send(tensors)
            for name, tensor in tensors.items():
                self._count(name, tensor)
        return reset

    def _changed(self, only: Container[str] | None) -> Iterator[tuple[str, Any]]:
        """The weights to push, counted; where an adapter is more than a sum, TRL merges it."""
        model = self._generation.model
        adapted = lora.is_adapted(model)
        if adapted and lora.unmergeable(model) is not None:
            merged = self._generation._iter_named_params()
            pairs: Iterator[tuple[str, Any]] = (pair for pair in merged if only is None or pair[0] in only)
        else:
            pairs = weights(self._generation, only, merged=adapted and self.way == "batched")
        for name, tensor in pairs:
            self._count(name, tensor)
            yield name, tensor

    def _counted(self, call_next: Next, /) -> Iterator[tuple[str, Any]]:
        for name, tensor in call_next():
            if ".modules_to_save." in name:  # TRL's reference adapter's, which it would push too
                continue
            if self.way == "merged":
                self._count(name, tensor)
            yield name, tensor

    def _count(self, name: str, tensor: Any) -> None:
        self._pushed.append(name)
        self._bytes += tensor.numel() * tensor.element_size()


def reset_caches(llm: Any, pushed: Iterable[str]) -> tuple[str, ...]:
    """Reset the caches that the weights `pushed` (trainer's names) make stale; say which. Two hold results of older
    weights: keys and values of prompts (the prefix cache), and embeddings of images (the encoder cache, keyed by the
    image alone), which TRL 1.16 leaves. The cache of processed images holds pixels, which no weight has touched."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    llm.reset_prefix_cache()
    if not changes_images(model, pushed):
        return ("prefix",)
    llm.llm_engine.reset_encoder_cache()
    return "prefix", "encoder"


def changes_images(model: Any, pushed: Iterable[str]) -> bool:
    """True if one of these weights is of the parts of vLLM's model that embed images; when in doubt, yes."""
    from vllm.model_executor.models import supports_multimodal

    if not supports_multimodal(model):
        return False
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if not hasattr(model, "get_mm_mapping") or mapper is None:
        return True
    parts = model.get_mm_mapping()
    return any(name.startswith((*parts.tower_model, *parts.connector)) for name in mapper.apply_list(list(pushed)))
