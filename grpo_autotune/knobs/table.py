"""The table of knobs: a row says whether its knob changes what is learned, its values, and why it matters.

Exact knobs change an optimizer step's time and memory and leave its mathematics alone; learning knobs change what is
learned. The split is the one that decides into which tuned file a change may go.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from grpo_autotune.config.foreign_keys import grpo_keys, peft_keys
from grpo_autotune.config.schema import RunConfig, SearchSection
from grpo_autotune.errors import ConfigError, nearest_path
from grpo_autotune.knobs import engine, engine_knobs, rules, values
from grpo_autotune.knobs.context import KnobContext

Kind = Literal["exact", "learning"]

PROMPTS = "prompts_per_step"
"""The one knob that is no key of the configuration: distinct prompts per optimizer step."""


class Knob(NamedTuple):
    """One row."""

    key: str  # key path in the configuration (`prompts_per_step` is derived: see `PROMPTS`)
    kind: Kind  # `exact` or `learning`; see `kind_of` for the knob that can be either
    why: str  # its effect on a step
    current: Callable[[RunConfig], Any]  # the user's own value, TRL's default where it is left out
    # values tried when the user names none, the user's own first; empty where the knob does not apply
    values: Callable[[KnobContext], tuple[Any, ...]]
    rule: rules.Rule = rules.no_rule  # the reason against a value
    searched: bool = False  # True if it is searched without being named in `search.knobs`


def grpo_value(name: str, config: RunConfig) -> Any:
    """The user's value of a key of `GRPOConfig`, TRL's default where it is left out."""
    return config.grpo[name] if name in config.grpo else grpo_keys()[name].default_value()


def _vllm(name: str, default: Any, config: RunConfig) -> Any:
    value = getattr(config.vllm, name)
    return default if value is None else value


def _rank(config: RunConfig) -> Any:
    return (config.peft or {}).get("r", peft_keys()["r"].default_value())


def _prompts(config: RunConfig) -> int | None:
    whole, rest = divmod(config.batch.completions_per_step, config.batch.num_generations)
    return None if rest else whole


def _key(
    key: str,
    kind: Kind,
    why: str,
    find: Callable[..., tuple[Any, ...]],
    *,
    rule: rules.Rule = rules.no_rule,
    searched: bool = False,
    current: Callable[[RunConfig], Any] | None = None,
) -> Knob:
    """A row whose values are found around the user's own."""
    read = current or partial(grpo_value, key.removeprefix("grpo."))
    return Knob(key, kind, why, read, lambda context: find(context, read(context.config)), rule, searched)


TABLE: tuple[Knob, ...] = (
    Knob(
        "data.image_size",
        "learning",
        "an image's tokens go with the square of its longest side",
        lambda config: config.data.image_size,
        values.image_sizes,
        rules.image_rule,
        searched=True,
    ),
    Knob(
        "grpo.num_generations",
        "learning",
        "the size of a group, at the same completions per step",
        lambda config: config.batch.num_generations,
        values.group_sizes,
        searched=True,
    ),
    Knob(
        "grpo.per_device_train_batch_size",
        "exact",
        "fewer, larger calls; accumulation follows, so that a step trains on the same completions",
        lambda config: config.batch.micro_batch,
        values.micro_batches,
        searched=True,
    ),
    _key(
        "vllm.gpu_memory_utilization",
        "exact",
        "memory for the engine's keys and values, taken from the trainer",
        engine_knobs.memory_shares,
        rule=engine_knobs.memory_share_rule,
        searched=True,
        current=engine.share_of,
    ),
    _key(
        "grpo.gradient_checkpointing",
        "exact",
        "activations are kept instead of computed twice",
        lambda context, own: values.switch(own),
        searched=True,
    ),
    Knob(
        "model.attn_implementation",
        "exact",
        "the kernel that computes attention",
        lambda config: config.model.attn_implementation,
        values.kernels,
        rules.kernel_rule,
        searched=True,
    ),
    _key(
        "vllm.max_num_seqs",
        "exact",
        "completions that are generated at once: fewer leave room to each, more fill the device",
        engine_knobs.running_counts,
        rule=engine_knobs.running_rule,
        searched=True,
        current=engine.running,
    ),
    _key(
        "vllm.max_num_batched_tokens",
        "exact",
        "tokens of one engine step: larger ones prefill faster and take memory for their activations",
        engine_knobs.batched_tokens,
        rule=engine_knobs.batched_rule,
        searched=True,
        current=engine.batched_tokens,
    ),
    _key(
        "vllm.sleep_level",
        "exact",
        "the engine gives its memory back while weights are trained, for the time of falling asleep and waking",
        engine_knobs.sleep_levels,
        rule=engine_knobs.sleep_rule,
        searched=True,
        current=engine.sleep_level,
    ),
    _key(
        "vllm.weight_sync",
        "exact",
        "an adapter is sent in no time and costs at every token; merged weights are sent whole and cost nothing then",
        engine_knobs.syncs,
        rule=engine_knobs.sync_rule,
        searched=True,
        current=lambda config: config.vllm.weight_sync,
    ),
    _key(
        "vllm.enable_prefix_caching",
        "exact",
        "a group's prompt is prefilled once",
        engine_knobs.engine_switch,
        rule=engine_knobs.colocate_rule,
        current=partial(_vllm, "enable_prefix_caching", True),
    ),
    _key(
        "vllm.enable_chunked_prefill",
        "exact",
        "long prompts are prefilled beside the tokens of others",
        engine_knobs.engine_switch,
        rule=engine_knobs.chunked_rule,
        current=partial(_vllm, "enable_chunked_prefill", True),
    ),
    _key(
        "vllm.enforce_eager",
        "exact",
        "no graphs and no compilation: a shorter start, slower tokens",
        engine_knobs.engine_switch,
        rule=engine_knobs.colocate_rule,
        current=partial(_vllm, "enforce_eager", False),
    ),
    _key(
        "vllm.speculative_config",
        "exact",
        "tokens drafted from the text so far and checked together: distributed as without, other draws",
        engine_knobs.speculations,
        rule=engine_knobs.speculation_rule,
        searched=True,
        current=partial(_vllm, "speculative_config", None),
    ),
    _key(
        "vllm.tensor_parallel_size",
        "exact",
        "GPUs that share one engine",
        engine_knobs.tensor_parallel_sizes,
        rule=engine_knobs.tensor_parallel_rule,
        searched=True,
        current=engine.written_tensor_parallel,
    ),
    _key(
        "vllm.server_gpus",
        "exact",
        "GPUs of a vLLM server beside the trainer; null is the engine in the training process",
        engine_knobs.server_gpus,
        rule=engine_knobs.server_rule,
        searched=True,
        current=lambda config: config.vllm.server_gpus,
    ),
    Knob(
        "grpo.use_vllm",
        "learning",
        "another engine samples, and TRL weighs its samples by how far its log-probs are off",
        lambda config: config.use_vllm,
        engine_knobs.engines,
        engine_knobs.engine_rule,
        searched=True,
    ),
    _key(
        "grpo.cache_implementation",
        "exact",
        "a cache of fixed size, over which `generate` is compiled; no prompt is shared in it",
        values.caches,
        rule=rules.cache_rule,
        searched=True,
    ),
    _key(
        "grpo.use_transformers_continuous_batching",
        "exact",
        "`generate` fills the place of a completion that has ended, and pages its cache",
        values.continuous,
        rule=rules.continuous_rule,
        searched=True,
    ),
    _key(
        "grpo.dataloader_pin_memory",
        "exact",
        "rows pass through memory that a GPU can read by itself, on a thread of their own",
        lambda context, own: values.switch(own) if context.gpus else (own,),
        rule=rules.pin_rule,
    ),
    _key(
        "grpo.dataloader_num_workers",
        "exact",
        "rows are read and images decoded beside the step",
        values.workers,
        rule=rules.worker_rule,
        searched=True,
    ),
    _key(
        "grpo.torch_compile",
        "exact",
        "fewer kernels per step, for a compilation at the start and at every new shape",
        values.compiling,
        rule=rules.compile_rule,
        searched=True,
    ),
    Knob(
        "speedups",
        "exact",
        "work that TRL does twice is done once",
        lambda config: config.speedups,
        lambda context: values.speed_ups(context, context.config.speedups),
        searched=True,
    ),
    _key(
        "vllm.kv_cache_dtype",
        "learning",
        "keys and values in 8 bits: twice as many completions at once, sampled a little differently",
        engine_knobs.cache_types,
        rule=engine_knobs.cache_type_rule,
        current=partial(_vllm, "kv_cache_dtype", "auto"),
    ),
    _key(
        "vllm.quantization",
        "learning",
        "the engine's base in 8 bits: less memory to read at every token, sampled a little differently",
        engine_knobs.quantizations,
        rule=engine_knobs.quantized_rule,
        current=partial(_vllm, "quantization", None),
    ),
    _key("grpo.max_completion_length", "learning", "the longest answer allowed", values.completion_lengths),
    _key("grpo.beta", "learning", "without a KL term no reference pass is made", values.betas),
    _key("peft.r", "learning", "the adapter's rank", values.ranks, rule=rules.adapter_rule, current=_rank),
    Knob(
        "grpo.steps_per_generation",
        "learning",
        "completions generated at a time, in the user's own micro steps; the later ones are from an older policy",
        lambda config: config.batch.steps_per_generation,
        values.steps_per_generation,
    ),
    _key("grpo.num_iterations", "learning", "how often each completion is trained on", values.iterations),
    _key(
        "model.load_in_4bit",
        "learning",
        "base weights in 4 bits: less memory, more arithmetic",
        values.precisions,
        rule=rules.four_bit_rule,
        current=lambda config: config.model.load_in_4bit,
    ),
    Knob(
        PROMPTS,
        "learning",
        "distinct prompts per optimizer step; accumulation follows",
        _prompts,
        values.prompts_per_step,
    ),
)

BY_KEY = {row.key: row for row in TABLE}

WORKERS = "grpo.dataloader_num_workers"
REACH = {
    WORKERS: ("data",),
    "grpo.dataloader_pin_memory": ("data",),
    "grpo.cache_implementation": ("generation",),
    "grpo.use_transformers_continuous_batching": ("generation",),
    "vllm.speculative_config": ("generation",),
}
"""Stages that a knob can make shorter; a knob that is not here may reach any."""


def check_keys(search: SearchSection) -> None:
    """Refuse a key of `search.knobs` or `search.accept` that is no knob.

    Raises:
        ConfigError: As `knob`, with the place of the key.
    """
    for section, keys in (("knobs", search.knobs), ("accept", search.accept)):
        for key in keys:
            knob(key, f"search.{section}.{key}")


def knob(key: str, where: str | None = None) -> Knob:
    """The row of a key, which stands at `where` in the configuration.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    if key in BY_KEY:
        return BY_KEY[key]
    near = nearest_path(key, list(BY_KEY))
    raise ConfigError(
        "this knob does not exist",
        where=where or key,
        fix=f"{f'Nearest: {near}. ' if near else ''}Known: {', '.join(BY_KEY)}.",
    )
