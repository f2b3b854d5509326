"""Rules of knobs on this machine and for this model: a rule answers None, or the reason against a value, a sentence."""

import math
import shutil
from collections.abc import Callable
from typing import Any

from grpo_autotune.hardware.machine import installed
from grpo_autotune.knobs.context import KnobContext, pixel_bounds
from grpo_autotune.speedups.base import kernel_name

Rule = Callable[[KnobContext, Any], str | None]
"""Takes what is known, with the knob applied in its `config`, and the knob's value."""

FLASH_KERNELS = {
    "flash_attention_2": ("flash_attn", "flash-attn, which is not installed (the extra `flash-attn`)"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3, which is not installed (or `kernels`)"),
}
"""Kernel -> module that holds it, and its package in words; `kernels` loads either from the hub."""
FLASH_CAPABILITY = 8.0
HOPPER = 9
"""Major compute capability that FlashAttention 3 is made for."""


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
    kernel = kernel_name(value)
    if kernel not in FLASH_KERNELS:
        return None
    name, (module, package) = f"model.attn_implementation {value}", FLASH_KERNELS[kernel]
    if context.gpus == 0:
        return f"{name} needs an NVIDIA GPU, and this machine has none"
    if not installed("kernels") and (value != kernel or not installed(module)):
        return f"{name} needs the package {package if value == kernel else 'kernels, which is not installed'}"
    capability = min(float(gpu.capability) for gpu in context.machine.gpus) if context.machine is not None else 0.0
    if capability < FLASH_CAPABILITY:
        return f"{name} needs a GPU of compute capability 8.0 or more, and this one has {capability}"
    if kernel == "flash_attention_3" and int(capability) != HOPPER:
        return f"{name} is made for Hopper (compute capability 9.0), and this GPU has {capability}"
    if context.config.model.dtype == "float32" and not context.config.grpo.get("bf16"):
        return f"{name} takes bfloat16 or float16, and model.dtype is float32"
    return None


def cache_rule(context: KnobContext, value: Any) -> str | None:
    """A kind of cache is `generate`'s."""
    grpo = context.config.grpo
    if value is not None and (context.config.use_vllm or grpo.get("use_transformers_continuous_batching")):
        return (
            f"grpo.cache_implementation {value} means nothing to vLLM and continuous batching, which page their caches"
        )
    return None


def continuous_rule(context: KnobContext, value: Any) -> str | None:
    """Continuous batching is for text, and TRL turns the model that it generates with into half precision for good
    (`_generate_single_turn` in trl/trainer/grpo_trainer.py)."""
    config, name = context.config, "grpo.use_transformers_continuous_batching true"
    if not value:
        return None
    if config.use_vllm:
        return f"{name} means nothing with grpo.use_vllm true"
    if context.images or "vision_config" in context.model:
        return f"{name} takes no model with a vision tower (TRL refuses it)"
    if context.gpus == 0:
        return f"{name} is not searched without a GPU"
    half = config.grpo.get("fp16") or config.grpo.get("bf16") is not False
    if half and (config.lora is not None or config.model.dtype not in ("bfloat16", "float16")):
        return f"{name} casts the trained weights to half precision for good, unless grpo.bf16 and fp16 are false"
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
    if context.config.lora is None:
        return "model.load_in_4bit true needs a peft section: weights in 4 bits cannot be trained"
    if not installed("bitsandbytes"):
        return "model.load_in_4bit true needs the package bitsandbytes (the extra `quantization`)"
    return None


def adapter_rule(context: KnobContext, value: Any) -> str | None:
    """LoRA's rank means something where an adapter begins."""
    if context.config.model.adapter is not None:
        return "peft.r is that of the adapter that the run goes on from (model.adapter)"
    return "peft.r means nothing without a peft section" if context.config.peft is None else None
