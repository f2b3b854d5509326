"""The input of a LoRA adapter without PEFT's round trip through float32 under autocast.

PEFT casts the input of each adapter to the type of the adapter's weights, float32, and autocast casts the copy back to
half precision before the product. A half-precision number survives that unchanged, forward and backward, so without it
every value and gradient is the same to the last bit, two kernels an adapter are not run, and adapters with one input
(query, key and value; gate and up) keep that input once for their backward pass instead of a copy each.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.seams.trainer_access import models_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import replaced
from grpo_autotune.speedups.selfcheck import autocast_dtype

CAST = "_cast_input_dtype"
"""PEFT's method of an adapter's layer that casts its input."""


class LoraInput:
    """The speed-up."""

    name = "lora_input"
    summary = "adapters read their half-precision input as it is, without PEFT's copy in float32"
    stands_for: tuple[str, ...] = ()

    def applies(self, trainer: Any) -> str | None:
        """None where an adapter's input makes the round trip."""
        if not (trainer.args.bf16 or trainer.args.fp16):
            return "neither grpo.bf16 nor grpo.fp16 is on: no input is cast back"
        if next(_adapted(trainer), None) is None:
            plain = "a plain LoRA adapter in float32 and without dropout (peft), whose input PEFT casts"
            return f"the model has no linear layer with {plain}"
        return None

    def install(self, trainer: Any) -> Installed:
        return _Uncast(self.name, trainer)


class _Uncast(Installed):
    """Layers of one trainer, and the casts that they left out."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.handles += [wrap(AttributeSlot(layer, CAST), self._cast, INNER) for layer in _adapted(trainer)]
        self.counts = {"adapters": float(len(self.handles)), "casts_left_out": 0.0}

    def _cast(self, call_next: Next, /, x: torch.Tensor | None, dtype: torch.dtype) -> Any:
        """`x` where autocast would bring the copy back to the type that `x` has."""
        if x is None or x.dtype == dtype or self.fell_back is not None or autocast_dtype(x.device.type) != x.dtype:
            return call_next(x, dtype)
        self.counts["casts_left_out"] += 1
        return x


def _adapted(trainer: Any) -> Iterator[nn.Module]:
    """Linear layers whose adapters are all plain LoRA in float32, without dropout, which would round its scaling; those
    on quantized layers cast nothing under autocast (peft/tuners/lora/bnb.py)."""
    from peft.tuners.lora import Linear

    for model in models_of(trainer):
        for layer in model.modules():
            if type(layer) is Linear and layer.lora_A and not layer.lora_variant and replaced(layer, CAST) is None:
                dropped = any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in layer.lora_dropout.values())
                if not dropped and all(part.weight.dtype == torch.float32 for part in layer.lora_A.values()):
                    yield layer
