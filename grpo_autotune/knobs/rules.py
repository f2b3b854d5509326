"""Rules of knobs on this machine and for this model: a rule answers None, or the reason against a value, a sentence."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

from grpo_autotune.hardware.machine import installed
from grpo_autotune.knobs.context import KnobContext, pixel_bounds

Rule = Callable[[KnobContext, Any], str | None]
"""Takes what is known, with the knob applied in its `config`, and the knob's value."""

FLASH_KERNELS = ("flash_attention_2", "flash_attention_3")
FLASH_CAPABILITY = 8.0


def no_rule(context: KnobContext, value: Any) -> str | None:
    """Legal wherever it is accepted."""
    return None


def image_rule(context: KnobContext, value: Any) -> str | None:
    """Image size means something where there are images, and above the size that the processor enlarges them to."""
    if value is not None and context.images is False:
        return f"data.image_size {value} changes nothing: the prompts hold no images"
    least = (pixel_bounds(context.config) or (0, 0))[0]
    if value is not None and value**2 < least:
        side = math.isqrt(least)
        return (
            f"data.image_size {value} saves nothing: the model's processor enlarges images below {side} x {side} pixels"
        )
    return None


def kernel_rule(context: KnobContext, value: Any) -> str | None:
    """Flash kernels need their package, a GPU of the Ampere generation or later, and half precision."""
    if value not in FLASH_KERNELS:
        return None
    name = f"model.attn_implementation {value}"
    if context.gpus == 0:
        return f"{name} needs an NVIDIA GPU, and this machine has none"
    if not installed("flash_attn") and not installed("kernels"):
        return f"{name} needs the package flash-attn, which is not installed (the extra `flash-attn`)"
    capability = min(float(gpu.capability) for gpu in context.machine.gpus) if context.machine is not None else 0.0
    if capability < FLASH_CAPABILITY:
        return f"{name} needs a GPU of compute capability 8.0 or more, and this one has {capability}"
    if context.config.model.dtype == "float32" and not context.config.grpo.get("bf16"):
        return f"{name} takes bfloat16 or float16, and model.dtype is float32"
    return None


def worker_rule(context: KnobContext, value: Any) -> str | None:
    """Loader workers need cores."""
    cores = context.machine.cores if context.machine is not None else value
    if value and value * context.config.batch.processes > cores:
        return (
            f"grpo.dataloader_num_workers {value} on each of {context.config.batch.processes} processes is more than "
            f"the {cores} cores of this machine"
        )
    return None


def compile_rule(context: KnobContext, value: Any) -> str | None:
    """torch.compile on the CPU writes C++ and needs a compiler for it."""
    if value and context.gpus == 0 and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "grpo.torch_compile true needs a C++ compiler on a machine without a GPU, and there is none"
    return None


def four_bit_rule(context: KnobContext, value: Any) -> str | None:
    """4-bit weights come from bitsandbytes, and only an adapter on them can be trained."""
    if not value:
        return None
    if context.config.peft is None:
        return "model.load_in_4bit true needs a peft section: weights in 4 bits cannot be trained"
    if not installed("bitsandbytes"):
        return "model.load_in_4bit true needs the package bitsandbytes (the extra `quantization`)"
    return None


def adapter_rule(context: KnobContext, value: Any) -> str | None:
    """LoRA's rank means something where there is an adapter."""
    return "peft.r means nothing without a peft section" if context.config.peft is None else None
