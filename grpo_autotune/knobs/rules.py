"""What stands in a knob's way on this machine and for this model: a rule answers null, or the reason in a sentence."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from grpo_autotune.knobs.given import Given

Rule = Callable[[Given, Any], str | None]
"""Takes what is known, with the knob turned in its `config`, and the knob's value."""

FLASH_KERNELS = ("flash_attention_2", "flash_attention_3")
FLASH_CAPABILITY = 8.0


@lru_cache(maxsize=32)
def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    return importlib.util.find_spec(package) is not None


def no_rule(given: Given, value: Any) -> str | None:
    """Legal wherever it is accepted."""
    return None


def image_rule(given: Given, value: Any) -> str | None:
    """Image size means something where there are images."""
    if value is not None and given.images is False:
        return f"data.image_size {value} changes nothing: the prompts hold no images"
    return None


def kernel_rule(given: Given, value: Any) -> str | None:
    """Flash kernels need their package, a GPU of the Ampere generation or later, and half precision."""
    if value not in FLASH_KERNELS:
        return None
    name = f"model.attn_implementation {value}"
    if given.gpus == 0:
        return f"{name} needs an NVIDIA GPU, and this machine has none"
    if not installed("flash_attn") and not installed("kernels"):
        return f"{name} needs the package flash-attn, which is not installed (the extra `flash-attn`)"
    capability = min(float(gpu.capability) for gpu in given.machine.gpus) if given.machine is not None else 0.0
    if capability < FLASH_CAPABILITY:
        return f"{name} needs a GPU of compute capability 8.0 or more, and this one has {capability}"
    if given.config.model.dtype == "float32" and not given.config.grpo.get("bf16"):
        return f"{name} takes bfloat16 or float16, and model.dtype is float32"
    return None


def engine_rule(given: Given, value: Any) -> str | None:
    """vLLM in the training process needs the package, a GPU, and prompts that TRL hands over unharmed."""
    if not value:
        return None
    if not installed("vllm"):
        return "grpo.use_vllm true needs the package vllm, which is not installed (the extra `vllm`)"
    if given.gpus == 0:
        return "grpo.use_vllm true is not searched without a GPU: the engine's CPU build is slower than `generate`"
    if given.images is not False:
        return "grpo.use_vllm true is not searched for prompts with images: TRL 1.16 hands vLLM wrong ones (trl#6294)"
    return None


def colocate_rule(given: Given, value: Any) -> str | None:
    """Engine keys mean something where vLLM generates in the training process."""
    if not given.config.use_vllm:
        return "The engine's keys mean nothing with grpo.use_vllm false"
    if given.config.vllm.mode == "server":
        return "The engine's keys mean nothing with vllm.mode server: the server was started with its own"
    return None


def memory_share_rule(given: Given, value: Any) -> str | None:
    """Some memory must be left to the trainer."""
    if value >= 0.95:
        return f"vllm.gpu_memory_utilization {value} leaves no memory to the trainer in the same process"
    return colocate_rule(given, value)


def tensor_parallel_rule(given: Given, value: Any) -> str | None:
    """Groups of ranks that share an engine must be of one size (trl/generation/vllm_generation.py)."""
    processes = given.config.batch.processes
    if processes % value:
        return f"vllm.tensor_parallel_size {value} does not divide the world size {processes}"
    return colocate_rule(given, value)


def worker_rule(given: Given, value: Any) -> str | None:
    """Loader workers need cores."""
    cores = given.machine.cores if given.machine is not None else value
    if value and value * given.config.batch.processes > cores:
        return (
            f"grpo.dataloader_num_workers {value} on each of {given.config.batch.processes} processes is more than the "
            f"{cores} cores of this machine"
        )
    return None


def compile_rule(given: Given, value: Any) -> str | None:
    """torch.compile on the CPU writes C++ and needs a compiler for it."""
    if value and given.gpus == 0 and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "grpo.torch_compile true needs a C++ compiler on a machine without a GPU, and there is none"
    return None


def four_bit_rule(given: Given, value: Any) -> str | None:
    """4-bit weights come from bitsandbytes, and only an adapter on them can be trained."""
    if not value:
        return None
    if given.config.peft is None:
        return "model.load_in_4bit true needs a peft section: weights in 4 bits cannot be trained"
    if not installed("bitsandbytes"):
        return "model.load_in_4bit true needs the package bitsandbytes (the extra `quantization`)"
    return None


def adapter_rule(given: Given, value: Any) -> str | None:
    """LoRA's rank means something where there is an adapter."""
    return "peft.r means nothing without a peft section" if given.config.peft is None else None
