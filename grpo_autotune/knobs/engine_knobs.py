"""Values of the rollout engine's knobs, and the rules that stand in a value's way.

A knob of the engine is a field in `config/vllm.py`, two lines in `table.py`, and here its values and its rule.
"""

import os
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.machine import installed
from grpo_autotune.knobs import engine
from grpo_autotune.knobs.context import KnobContext
from grpo_autotune.knobs.values import divisors, switch
from grpo_autotune.rollout.failures import CPU_SPACE
from grpo_autotune.rollout.server.command import SENDS, split_gpus
from grpo_autotune.units import GIB

MOST_SHARE = 0.95
BATCHED_TOKENS = (2048, 4096, 8192, 16384)
SPECULATIONS: tuple[dict[str, Any], ...] = (
    {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    {"method": "suffix"},
)
"""Drafts without a model of their own: what followed the same tokens before, in this text or in any."""
MEMORY_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def engine_rule(context: KnobContext, value: Any) -> str | None:
    """vLLM in the training process needs the package and a GPU."""
    if not value:
        return None
    if not installed("vllm"):
        return "grpo.use_vllm true needs the package vllm, which is not installed (the extra `vllm`)"
    if context.gpus == 0:
        return "grpo.use_vllm true is not searched without a GPU: the engine's CPU build is slower than `generate`"
    return None


def colocate_rule(context: KnobContext, value: Any) -> str | None:
    """Engine keys mean something where vLLM generates, in the training process or in a server of the run's own."""
    if not context.config.use_vllm:
        return "The engine's keys mean nothing with grpo.use_vllm false"
    if context.config.vllm.at_server and context.config.vllm.server_gpus is None:
        return "The engine's keys mean nothing with vllm.mode server: the server was started with its own"
    return None


def beside_rule(context: KnobContext, value: Any) -> str | None:
    """Keys that tell how an engine shares a process with the trainer mean nothing to a server."""
    if context.config.vllm.at_server:
        return "This key means nothing to a server, which has a process of its own"
    return colocate_rule(context, value)


def server_rule(context: KnobContext, value: Any) -> str | None:
    """A server of the run's own needs GPUs that do not train; without a GPU, an adapter, which needs no NCCL."""
    config = context.config
    if value is None and config.use_vllm:
        share = engine.share_of(config)
        return _nothing_left(share) if share >= MOST_SHARE else room_rule(context, value)
    if not config.use_vllm:
        return colocate_rule(context, value)
    if not installed("vllm"):
        return f"vllm.server_gpus {value} needs the package vllm, which is not installed (the extra `vllm`)"
    if context.machine is not None:
        try:
            split_gpus(config, context.gpus)
        except ConfigError as error:
            return f"{error.where} {value}: {error.what}"
    if context.gpus == 0 and (config.lora is None or config.vllm.weight_sync not in SENDS):
        return (
            f"vllm.server_gpus {value} without a GPU needs a peft section, and vllm.weight_sync adapter or auto: all "
            "weights are sent over NCCL"
        )
    return None


def memory_share_rule(context: KnobContext, value: Any) -> str | None:
    """Some memory must be left to the trainer, and the engine must find room in its share."""
    if context.config.vllm.at_server:
        return beside_rule(context, value)
    if value >= MOST_SHARE:
        return _nothing_left(value)
    if context.gpus == 0 and context.machine is not None and os.environ.get(CPU_SPACE):
        return f"vllm.gpu_memory_utilization changes nothing: {CPU_SPACE} sizes the engine's keys and values on the CPU"
    return colocate_rule(context, value) or room_rule(context, value)


def _nothing_left(share: float) -> str:
    return f"vllm.gpu_memory_utilization {share} leaves no memory to the trainer in the same process"


def room_rule(context: KnobContext, value: Any) -> str | None:
    """Weights, activations and one request of full length must fit into the engine's share."""
    need, share = engine.need_of(context), engine.share_bytes(context)
    if need is None or share is None or need.least <= share:
        return None
    return (
        f"vllm.gpu_memory_utilization {engine.share_of(context.config)} is {share / GIB:.1f} GiB, and the engine needs "
        f"{need.least / GIB:.1f} GiB: weights {need.weights / GIB:.1f}, activations {need.activations / GIB:.1f}, one "
        f"request of {engine.longest(context)} tokens {need.request / GIB:.1f}"
    )


def running_rule(context: KnobContext, value: Any) -> str | None:
    """More sequences than a generation has would stay empty, and each needs a token of every engine step."""
    rows = engine.rows_of_generation(context.config)
    if value > rows:
        return f"vllm.max_num_seqs {value} is more than the {rows} completions of a generation"
    return colocate_rule(context, value) or _steps_hold(context)


def batched_rule(context: KnobContext, value: Any) -> str | None:
    """An engine step holds a token of every sequence, and a whole prompt where prompts are not split."""
    return colocate_rule(context, value) or _steps_hold(context) or room_rule(context, value)


def chunked_rule(context: KnobContext, value: Any) -> str | None:
    """Prompts that are not split must fit into one engine step."""
    return colocate_rule(context, value) or _steps_hold(context)


def sleep_rule(context: KnobContext, value: Any) -> str | None:
    """vLLM's CPU build has no sleep mode."""
    if value and context.gpus == 0:
        return f"vllm.sleep_level {value} needs a GPU: vLLM's CPU build has no sleep mode"
    return beside_rule(context, value) or _weights_come_back(context)


def _weights_come_back(context: KnobContext) -> str | None:
    """The reason why an engine that has slept would have no weights (`rollout.sync.sync.check_quantized`)."""
    config = context.config
    if (
        config.vllm.quantization is not None
        and not config.vllm.at_server
        and engine.sleep_level(config) == engine.SLEEP
    ):
        name = config.vllm.quantization
        return f"vllm.sleep_level 2 throws the engine's weights away, and {name} layers take no new ones"
    return None


def sync_rule(context: KnobContext, value: Any) -> str | None:
    """An adapter is sent where one is trained; a quantized engine takes nothing else."""
    config = context.config
    if not config.use_vllm:
        return colocate_rule(context, value)
    if value == "adapter" and config.lora is None:
        return "vllm.weight_sync adapter needs a peft section: there is no adapter to send"
    if value != "adapter" and config.vllm.quantization is not None:
        return f"vllm.weight_sync {value} pushes weights, and layers in {config.vllm.quantization} take none"
    if value == "merged" and config.model.load_in_4bit:
        return "vllm.weight_sync merged would round the adapter away in weights of 4 bits (model.load_in_4bit)"
    if value in ("merged", "batched") and config.vllm.at_server and context.gpus == 0:
        return f"vllm.weight_sync {value} to a server needs a GPU"
    return None


def quantized_rule(context: KnobContext, value: Any) -> str | None:
    """Trained weights cannot be pushed into quantized ones; an adapter beside them can."""
    if value is None:
        return colocate_rule(context, value)
    if context.gpus == 0:
        return f"vllm.quantization {value} needs a GPU"
    if context.config.vllm.weight_sync != "adapter" or context.config.lora is None:
        return f"vllm.quantization {value} needs vllm.weight_sync adapter: weights cannot be pushed into quantized ones"
    return colocate_rule(context, value) or room_rule(context, value) or _weights_come_back(context)


def speculation_rule(context: KnobContext, value: Any) -> str | None:
    """Rejection sampling in vLLM knows no `min_p` (`_validate_spec_decode` in vllm/sampling_params.py), and suffix
    trees come from a package."""
    if value is None:
        return colocate_rule(context, value)
    if context.config.grpo.get("min_p"):
        return "vllm.speculative_config cannot sample with grpo.min_p"
    if value.get("method") == "suffix" and not installed("arctic_inference"):
        return "vllm.speculative_config suffix needs the package arctic-inference, which is not installed"
    return colocate_rule(context, value)


def cache_type_rule(context: KnobContext, value: Any) -> str | None:
    """Keys and values in 8 bits have kernels on a GPU."""
    if str(value).startswith("fp8") and context.gpus == 0:
        return f"vllm.kv_cache_dtype {value} needs a GPU"
    return colocate_rule(context, value)


def _steps_hold(context: KnobContext) -> str | None:
    """The reason why an engine step is too small (`verify_max_model_len` in vllm/config/scheduler.py)."""
    tokens, running = engine.batched_tokens(context.config), engine.running(context.config)
    if tokens < running:
        return f"vllm.max_num_batched_tokens {tokens} is less than vllm.max_num_seqs {running}: vLLM refuses it"
    whole = engine.longest(context)
    if context.config.vllm.enable_chunked_prefill is False and whole is not None and tokens < whole:
        return (
            f"vllm.max_num_batched_tokens {tokens} is less than vllm.max_model_len {whole}, which needs "
            "vllm.enable_chunked_prefill: vLLM refuses it"
        )
    return None


def tensor_parallel_rule(context: KnobContext, value: Any) -> str | None:
    """Groups of ranks that share an engine must be of one size (trl/generation/vllm_generation.py)."""
    processes = context.config.batch.processes
    if processes % value:
        return f"vllm.tensor_parallel_size {value} does not divide the world size {processes}"
    return beside_rule(context, value)


def engines(context: KnobContext, own: bool) -> tuple[bool, ...]:
    """`generate`, and vLLM in the training process where it runs; a server stays what it is."""
    if own and _elsewhere(context):
        return (True,)
    return switch(own) if own or engine_rule(context, True) is None else (False,)


def memory_shares(context: KnobContext, own: float) -> tuple[float, ...]:
    """The user's own, and the usual shares, unless vLLM's CPU build is told its size by a variable."""
    shares = MEMORY_SHARES if context.gpus > 0 or not os.environ.get(CPU_SPACE) else ()
    return (own, *(share for share in shares if share != own))


def running_counts(context: KnobContext, own: int) -> tuple[int, ...]:
    """The user's own, every completion of a generation at once, half and a quarter of them."""
    rows = engine.rows_of_generation(context.config)
    return (own, *sorted({max(1, rows // 4), max(1, rows // 2), rows} - {own}))


def batched_tokens(context: KnobContext, own: int) -> tuple[int, ...]:
    """The user's own, and the usual ones; on a CPU, where a step is long, they wait to be asked for."""
    return (own, *(n for n in BATCHED_TOKENS if n != own)) if context.gpus else (own,)


def sleep_levels(context: KnobContext, own: int) -> tuple[int, ...]:
    """The three levels, where there is a GPU to give memory back to."""
    return (own, *(n for n in (0, 1, 2) if n != own and context.gpus))


def syncs(context: KnobContext, own: str) -> tuple[str, ...]:
    """The user's own; beside an adapter, whose layers every token passes, the push of merged weights in batches."""
    adapter = context.config.lora is not None
    if own == "auto":
        return (own, "batched") if adapter else (own,)
    return (own, *(way for way in (("batched", "adapter") if adapter else ("batched",)) if way != own))


def eight_bits(context: KnobContext, own: str | None) -> tuple[str | None, ...]:
    """The user's own, and 8 bits on a GPU."""
    return (own, "fp8") if context.gpus and own != "fp8" else (own,)


def speculations(context: KnobContext, own: dict[str, Any] | None) -> tuple[dict[str, Any] | None, ...]:
    """None, the user's own, and on a GPU those that draft from the text."""
    others = (value for value in (None, *(SPECULATIONS if context.gpus else ())) if value != own)
    return (own, *(value for value in others if value is None or speculation_rule(context, value) is None))


def tensor_parallel_sizes(context: KnobContext, own: int) -> tuple[int, ...]:
    """Divisors of the world size."""
    processes = context.config.batch.processes
    return (own, *(n for n in divisors(processes) if n != own)) if processes > 1 else ()


def server_gpus(context: KnobContext, own: int | None) -> tuple[int | None, ...]:
    """The engine in the training process, and a server on one, two, four ... of the GPUs that do not train; on a
    machine without a GPU a server waits to be asked for."""
    free = context.gpus - context.config.batch.processes
    counts = [2**k for k in range(free.bit_length()) if 2**k <= free] if free > 0 else []
    return (own, *(n for n in (None, *counts) if n != own))


def colocates(context: KnobContext) -> bool:
    """True if an engine is, or can be, in the training process or in a server of the run's own."""
    return not _elsewhere(context) and any(engines(context, context.config.use_vllm))


def _elsewhere(context: KnobContext) -> bool:
    """True if completions come from a server that somebody else has started."""
    return context.config.vllm.at_server and context.config.vllm.server_gpus is None
