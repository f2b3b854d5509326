"""LoRA adapters added to their layers' weights while completions are written: a layer is one product, not three.

The weights with adapters are new tensors; the layers' own parameters are set aside and put back, to the last bit. The
policy that writes completions is the policy that is trained, up to the rounding of one sum per weight: in float32 as
exact as the other speed-ups; in bfloat16 an adapter smaller than the rounding of its weights is partly lost, which is
why it has to be asked for there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from grpo_autotune.seams.layers import INNER, Next
from grpo_autotune.seams.ranks import sharded
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import active_dropout
from grpo_autotune.speedups.generation.weights import Replacement, replaced
from grpo_autotune.speedups.selfcheck import SelfCheck

CHECKED_ROWS = 4


class MergeForGeneration:
    """The speed-up; `weights: float32` merges into weights of that type alone, `any` into bfloat16 and float16 too."""

    name = "merge_for_generation"
    summary = "generate runs on weights with the LoRA adapters added, and the training on the weights as they were"
    stands_for = ("model.generate",)

    def __init__(self, weights: str = "float32") -> None:
        self.weights = weights

    def applies(self, trainer: Any) -> str | None:
        """None where transformers generates from LoRA layers that are a weight and two factors."""
        if trainer.use_vllm:
            return "grpo.use_vllm: the engine has weights of its own"
        if trainer.use_transformers_continuous_batching:
            return "grpo.use_transformers_continuous_batching casts the model's weights"
        if sharded(trainer) and (trainer.is_fsdp_enabled or not trainer.args.ds3_gather_for_generation):
            return "FSDP, or ZeRO 3 without grpo.ds3_gather_for_generation: no rank has whole weights to merge into"
        if trainer.args.torch_compile:
            return "a compiled model would be compiled again for every generation (grpo.torch_compile)"
        if (dropout := active_dropout(trainer.model)) is not None:
            return f"{dropout}: the adapter's input is not the layer's"
        return self._why_not_these(trainer.model)

    def install(self, trainer: Any) -> Installed:
        installed = _Merging(self.name, trainer)
        installed.handles += wrap_seams(trainer, INNER, model_generate=installed.generate)
        return installed

    def _why_not_these(self, model: Any) -> str | None:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not layers:
            return "no LoRA adapter (peft)"
        for layer in layers:
            if (reason := _why_not(layer)) is not None:
                return reason
            dtype = str(layer.get_base_layer().weight.dtype).removeprefix("torch.")
            if self.weights == "float32" and dtype != "float32":
                return f"model.dtype is {dtype}, whose rounding can hide an adapter (speedups: weights: any merges it)"
        return None


def _why_not(layer: Any) -> str | None:
    """The reason why an adapter's layer cannot be merged in one sum; None where it can."""
    base = layer.get_base_layer()
    if type(layer) is not Linear or type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
        return f"the adapter has a {type(layer).__name__} on a {type(base).__name__}, which is no plain LoRA"
    if any(layer.lora_variant.values()) or any(layer.lora_bias.values()):
        return "the adapter is a variant of LoRA (peft.use_dora, peft.lora_bias, ...)"
    return None


class _Merging(Installed):
    """The layer of one trainer."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        self._check = SelfCheck(self)
        self.counts = {"generations": 0.0, "layers": 0.0}  # on merged weights, and merged for them

    def generate(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        layers = [] if self.fell_back else list(to_merge(self.trainer.model))
        if not layers or not self._agree(layers):
            return call_next(*args, **kwargs)
        self.counts["generations"] += 1
        self.counts["layers"] += len(layers)
        with merged(layers):
            return call_next(*args, **kwargs)

    def _agree(self, layers: list[Linear]) -> bool:
        """Compare each layer's outputs for a few random rows, once."""

        def outputs() -> torch.Tensor:
            return torch.cat([layer(_random_rows(layer)).flatten().float() for layer in layers])

        def with_merged() -> torch.Tensor:
            with merged(layers):
                return outputs()

        dtype = layers[0].get_base_layer().weight.dtype
        return self._check.run(outputs, with_merged, dtype, "outputs of the adapter's layers")


def _random_rows(layer: Linear) -> torch.Tensor:
    weight = layer.get_base_layer().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CHECKED_ROWS, weight.shape[1], generator=generator).to(weight)


def to_merge(model: Any) -> Iterator[Linear]:
    """Layers whose adapters are at work and not merged already."""
    for module in model.modules():
        if isinstance(module, Linear) and not module.disable_adapters and not module.merged and _active(module):
            yield module


def _active(layer: Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


@contextmanager
def merged(layers: list[Linear]) -> Iterator[None]:
    """Inside it, each layer is one product; afterwards its weight is the very parameter that it was."""
    with torch.no_grad(), replaced([_merged(layer) for layer in layers]):
        for layer in layers:
            layer.merged_adapters.extend(_active(layer))  # PEFT's own mark: `forward` runs the base layer alone
        try:
            yield
        finally:
            for layer in layers:
                layer.merged_adapters.clear()


def _merged(layer: Linear) -> Replacement:
    base = layer.get_base_layer()
    weight = base.weight.detach()
    exact = torch.promote_types(weight.dtype, torch.float32)
    total = sum((layer.get_delta_weight(name).to(exact) for name in _active(layer)), weight.to(exact))
    return base, total.to(weight.dtype)
