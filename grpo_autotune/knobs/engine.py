"""A colocated engine by its configuration: defaults of TRL and vLLM filled in, and the memory that follows."""

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.engine import BYTES, EIGHT_BITS, HALF_BYTES, EngineNeed, engine_need
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.knobs.context import KnobContext, gpu_bytes
from grpo_autotune.rollout.server.command import TRL_BATCHED_TOKENS

TRL_SHARE = 0.3
"""`vllm_gpu_memory_utilization` where nothing is said."""

VLLM_SHARE = 0.92
"""Of a server where nothing is said (`CacheConfig` in vllm/config/cache.py)."""

SLEEP = 2
"""TRL's level (trl/generation/vllm_generation.py)."""

DESCRIBED = frozenset((
    "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size",
    "sleep_level", "enable_sleep_mode", "weight_sync", "mode", "server_gpus",
))  # fmt: skip
"""Engine keys that a formula takes, or that `word` has in its own form."""


def share_of(config: RunConfig) -> float:
    """Share of the device's memory that the engine takes."""
    default = VLLM_SHARE if config.vllm.at_server else TRL_SHARE
    return default if config.vllm.gpu_memory_utilization is None else config.vllm.gpu_memory_utilization


def tensor_parallel(config: RunConfig) -> int:
    """GPUs that share an engine."""
    return config.vllm.tensor_parallel_size or config.vllm.server_gpus or 1


def rows_of_generation(config: RunConfig) -> int:
    """Completions that one engine is asked for at a time."""
    if config.vllm.at_server:
        return config.batch.generation_batch
    return config.batch.micro_batch * config.batch.steps_per_generation * tensor_parallel(config)


def running(config: RunConfig) -> int:
    """Completions that are generated at once."""
    return config.vllm.max_num_seqs or rows_of_generation(config)


def batched_tokens(config: RunConfig) -> int:
    """Tokens of one engine step."""
    return config.vllm.max_num_batched_tokens or TRL_BATCHED_TOKENS


def waves(config: RunConfig) -> float:
    """Rounds in which the completions of a generation are generated: 1 where all are at once."""
    return max(1.0, rows_of_generation(config) / running(config)) if config.use_vllm else 1.0


def word(config: RunConfig) -> str:
    """The engine that generates, and its settings that no formula describes."""
    section = config.vllm
    if not config.use_vllm:
        paged = "paged" if config.grpo.get("use_transformers_continuous_batching") else ""
        return " ".join(filter(None, ("generate", config.grpo.get("cache_implementation"), paged)))
    if section.at_server and section.server_gpus is None:
        return "server"
    settings = section.model_dump(exclude_none=True)
    others = [f"{name} {value}" for name, value in settings.items() if name not in DESCRIBED]
    place = () if section.server_gpus is None else ("server", section.server_gpus)
    return " ".join(map(str, (*place, batched_tokens(config), section.weight_sync, sleep_level(config), *others)))


def sleep_level(config: RunConfig) -> int:
    """Level of sleep while weights are trained, 0 for none: memory that the engine gives back."""
    if config.vllm.sleep_level is not None:
        return config.vllm.sleep_level
    return SLEEP if config.vllm.enable_sleep_mode else 0


def longest(context: KnobContext) -> int | None:
    """Longest request in tokens: the model's own length where nothing is said; None where nobody knows it."""
    longest_row = context.config.vllm.max_model_len or context.text.get("max_position_embeddings")
    return int(longest_row) if longest_row else None


def share_bytes(context: KnobContext) -> float | None:
    """Bytes of the engine's share; None where it is not on a GPU of this machine."""
    whole = gpu_bytes(context.machine, context.record.trainer if context.record is not None else None)
    return None if whole is None else share_of(context.config) * whole


def need_of(context: KnobContext) -> EngineNeed | None:
    """Memory of the engine, from the model's config.json alone; None where that has no formulas."""
    whole, config = longest(context), context.config
    if whole is None:
        return None
    try:
        shape = ModelShape.from_config(context.model)
    except ConfigError:
        return None
    return need(shape, config, whole, whole, value_bytes(context))


def need(shape: ModelShape, config: RunConfig, whole: float, row: float, value: float) -> EngineNeed:
    """Memory of the engine with requests of at most `whole` tokens, rows of `row`, and numbers of `value` bytes."""
    return engine_need(
        shape,
        longest=whole,
        row=row,
        batched_tokens=batched_tokens(config),
        running=running(config),
        value_bytes=value,
        weight_bytes=EIGHT_BITS if config.vllm.quantization == "fp8" else None,
        cache_bytes=EIGHT_BITS if str(config.vllm.kv_cache_dtype).startswith("fp8") else None,
        tensor_parallel=tensor_parallel(config),
    )


def value_bytes(context: KnobContext) -> float:
    """Bytes of a number that the engine computes with; it follows the trainer."""
    config = context.config
    if config.grpo.get("bf16") or config.grpo.get("fp16"):
        return HALF_BYTES
    names = (config.vllm.dtype, config.model.dtype, context.model.get("dtype"), context.text.get("dtype"))
    return next((BYTES[str(name)] for name in names if str(name) in BYTES), HALF_BYTES)
