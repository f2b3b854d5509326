"""What stands in a knob's way on this machine and for this model: a rule answers null, or the reason in a sentence."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.machine import installed
from grpo_autotune.knobs import engine
from grpo_autotune.knobs.context import Given, pixel_bounds
from grpo_autotune.rollout.failures import CPU_SPACE, GIB
from grpo_autotune.rollout.server.command import SENDS, split_gpus

Rule = Callable[[Given, Any], str | None]
"""Takes what is known, with the knob turned in its `config`, and the knob's value."""

FLASH_KERNELS = ("flash_attention_2", "flash_attention_3")
FLASH_CAPABILITY = 8.0
MOST_SHARE = 0.95


def no_rule(given: Given, value: Any) -> str | None:
    """Legal wherever it is accepted."""
    return None


def image_rule(given: Given, value: Any) -> str | None:
    """Image size means something where there are images, and above the size that the processor enlarges them to."""
    if value is not None and given.images is False:
        return f"data.image_size {value} changes nothing: the prompts hold no images"
    least = (pixel_bounds(given.config) or (0, 0))[0]
    if value is not None and value**2 < least:
        side = math.isqrt(least)
        return (
            f"data.image_size {value} saves nothing: the model's processor enlarges images below {side} x {side} pixels"
        )
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
    """vLLM in the training process needs the package and a GPU."""
    if not value:
        return None
    if not installed("vllm"):
        return "grpo.use_vllm true needs the package vllm, which is not installed (the extra `vllm`)"
    if given.gpus == 0:
        return "grpo.use_vllm true is not searched without a GPU: the engine's CPU build is slower than `generate`"
    return None


def colocate_rule(given: Given, value: Any) -> str | None:
    """Engine keys mean something where vLLM generates, in the training process or in a server of the run's own."""
    if not given.config.use_vllm:
        return "The engine's keys mean nothing with grpo.use_vllm false"
    if given.config.vllm.at_server and given.config.vllm.server_gpus is None:
        return "The engine's keys mean nothing with vllm.mode server: the server was started with its own"
    return None


def beside_rule(given: Given, value: Any) -> str | None:
    """Keys that tell how an engine shares a process with the trainer mean nothing to a server."""
    if given.config.vllm.at_server:
        return "This key means nothing to a server, which has a process of its own"
    return colocate_rule(given, value)


def server_rule(given: Given, value: Any) -> str | None:
    """A server of the run's own needs GPUs that do not train; without a GPU, an adapter, which needs no NCCL."""
    config = given.config
    if value is None and config.use_vllm:
        share = engine.share_of(config)
        return _nothing_left(share) if share >= MOST_SHARE else room_rule(given, value)
    if not config.use_vllm:
        return colocate_rule(given, value)
    if not installed("vllm"):
        return f"vllm.server_gpus {value} needs the package vllm, which is not installed (the extra `vllm`)"
    if given.machine is not None:
        try:
            split_gpus(config, given.gpus)
        except ConfigError as error:
            return f"{error.where} {value}: {error.what}"
    if given.gpus == 0 and (config.peft is None or config.model.load_in_4bit or config.vllm.weight_sync not in SENDS):
        return (
            f"vllm.server_gpus {value} without a GPU needs a peft section on a base that is not in 4 bits, and "
            "vllm.weight_sync adapter or auto: all weights are sent over NCCL"
        )
    return None


def memory_share_rule(given: Given, value: Any) -> str | None:
    """Some memory must be left to the trainer, and the engine must find room in its share."""
    if given.config.vllm.at_server:
        return beside_rule(given, value)
    if value >= MOST_SHARE:
        return _nothing_left(value)
    if given.gpus == 0 and given.machine is not None and os.environ.get(CPU_SPACE):
        return f"vllm.gpu_memory_utilization changes nothing: {CPU_SPACE} sizes the engine's keys and values on the CPU"
    return colocate_rule(given, value) or room_rule(given, value)


def _nothing_left(share: float) -> str:
    return f"vllm.gpu_memory_utilization {share} leaves no memory to the trainer in the same process"


def room_rule(given: Given, value: Any) -> str | None:
    """Weights, activations and one request of full length must fit into the engine's share."""
    need, share = engine.need_of(given), engine.share_bytes(given)
    if need is None or share is None or need.least <= share:
        return None
    return (
        f"vllm.gpu_memory_utilization {engine.share_of(given.config)} is {share / GIB:.1f} GiB, and the engine needs "
        f"{need.least / GIB:.1f} GiB: weights {need.weights / GIB:.1f}, activations {need.activations / GIB:.1f}, one "
        f"request of {engine.longest(given)} tokens {need.request / GIB:.1f}"
    )


def running_rule(given: Given, value: Any) -> str | None:
    """More sequences than a generation has would stay empty, and each needs a token of every engine step."""
    rows = engine.rows_of_generation(given.config)
    if value > rows:
        return f"vllm.max_num_seqs {value} is more than the {rows} completions of a generation"
    return colocate_rule(given, value) or _steps_hold(given)


def batched_rule(given: Given, value: Any) -> str | None:
    """An engine step holds a token of every sequence, and a whole prompt where prompts are not split."""
    return colocate_rule(given, value) or _steps_hold(given) or room_rule(given, value)


def chunked_rule(given: Given, value: Any) -> str | None:
    """Prompts that are not split must fit into one engine step."""
    return colocate_rule(given, value) or _steps_hold(given)


def sleep_rule(given: Given, value: Any) -> str | None:
    """vLLM's CPU build has no sleep mode."""
    if value and given.gpus == 0:
        return f"vllm.sleep_level {value} needs a GPU: vLLM's CPU build has no sleep mode"
    return beside_rule(given, value)


def sync_rule(given: Given, value: Any) -> str | None:
    """An adapter is sent where one is trained; a quantized engine takes nothing else."""
    config = given.config
    if not config.use_vllm:
        return colocate_rule(given, value)
    if value == "adapter" and config.peft is None:
        return "vllm.weight_sync adapter needs a peft section: there is no adapter to send"
    if value == "merged" and config.model.load_in_4bit:
        return "vllm.weight_sync merged would round the adapter away in weights of 4 bits (model.load_in_4bit)"
    if value in ("merged", "batched") and config.vllm.at_server and given.gpus == 0:
        return f"vllm.weight_sync {value} to a server needs a GPU"
    return None


def quantized_rule(given: Given, value: Any) -> str | None:
    """Trained weights cannot be pushed into quantized ones; an adapter beside them can."""
    if value is None:
        return colocate_rule(given, value)
    if given.gpus == 0:
        return f"vllm.quantization {value} needs a GPU"
    if given.config.vllm.weight_sync != "adapter" or given.config.peft is None:
        return f"vllm.quantization {value} needs vllm.weight_sync adapter: weights cannot be pushed into quantized ones"
    return colocate_rule(given, value) or room_rule(given, value)


def cache_type_rule(given: Given, value: Any) -> str | None:
    """Keys and values in 8 bits have kernels on a GPU."""
    if str(value).startswith("fp8") and given.gpus == 0:
        return f"vllm.kv_cache_dtype {value} needs a GPU"
    return colocate_rule(given, value)


def _steps_hold(given: Given) -> str | None:
    """What an engine step cannot hold (`verify_max_model_len` in vllm/config/scheduler.py)."""
    tokens, running = engine.batched_tokens(given.config), engine.running(given.config)
    if tokens < running:
        return f"vllm.max_num_batched_tokens {tokens} is less than vllm.max_num_seqs {running}: vLLM refuses it"
    whole = engine.longest(given)
    if given.config.vllm.enable_chunked_prefill is False and whole is not None and tokens < whole:
        return (
            f"vllm.max_num_batched_tokens {tokens} is less than vllm.max_model_len {whole}, which needs "
            "vllm.enable_chunked_prefill: vLLM refuses it"
        )
    return None


def tensor_parallel_rule(given: Given, value: Any) -> str | None:
    """Groups of ranks that share an engine must be of one size (trl/generation/vllm_generation.py)."""
    processes = given.config.batch.processes
    if processes % value:
        return f"vllm.tensor_parallel_size {value} does not divide the world size {processes}"
    return beside_rule(given, value)


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
