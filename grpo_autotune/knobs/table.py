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


def own_value(key: str, config: RunConfig) -> Any:
    """The user's value of a key, the default of TRL or vLLM where it is left out."""
    section, _, name = key.partition(".")
    if section == "grpo":
        return grpo_value(name, config)
    value = getattr(getattr(config, section), name) if name else getattr(config, section)
    return VLLM_DEFAULTS.get(key) if value is None else value


VLLM_DEFAULTS = {
    "vllm.enable_prefix_caching": True,
    "vllm.enable_chunked_prefill": True,
    "vllm.enforce_eager": False,
    "vllm.kv_cache_dtype": "auto",
}


def _rank(config: RunConfig) -> Any:
    return (config.peft or {}).get("r", peft_keys()["r"].default_value())


def _prompts(config: RunConfig) -> int | None:
    whole, rest = divmod(config.batch.completions_per_step, config.batch.num_generations)
    return None if rest else whole


ROWS = """
learning searched data.image_size: an image's tokens go with the square of its longest side
learning searched grpo.num_generations: the size of a group, at the same completions per step
exact searched grpo.per_device_train_batch_size: fewer, larger calls; accumulation follows, so that a step trains on the
  same completions
exact searched vllm.gpu_memory_utilization: memory for the engine's keys and values, taken from the trainer
exact searched grpo.gradient_checkpointing: activations are kept instead of computed twice
exact searched model.attn_implementation: the kernel that computes attention
exact searched vllm.max_num_seqs: completions that are generated at once: fewer leave room to each, more fill the device
exact searched vllm.max_num_batched_tokens: tokens of one engine step: larger ones prefill faster and take memory for
  their activations
exact searched vllm.sleep_level: the engine gives its memory back while weights are trained, for the time of falling
  asleep and waking
exact searched vllm.weight_sync: an adapter is sent in no time and costs at every token; merged weights are sent whole
  and cost nothing then
exact named vllm.enable_prefix_caching: a group's prompt is prefilled once
exact named vllm.enable_chunked_prefill: long prompts are prefilled beside the tokens of others
exact named vllm.enforce_eager: no graphs and no compilation: a shorter start, slower tokens
exact searched vllm.speculative_config: tokens drafted from the text so far and checked together: distributed as
  without, other draws
exact searched vllm.tensor_parallel_size: GPUs that share one engine
exact searched vllm.server_gpus: GPUs of a vLLM server beside the trainer; null is the engine in the training process
learning searched grpo.use_vllm: another engine samples, and TRL weighs its samples by how far its log-probs are off
exact searched grpo.cache_implementation: a cache of fixed size, over which `generate` is compiled; no prompt is shared
  in it
exact searched grpo.use_transformers_continuous_batching: `generate` fills the place of a completion that has ended, and
  pages its cache
exact named grpo.dataloader_pin_memory: rows pass through memory that a GPU can read by itself, on a thread of their own
exact searched grpo.dataloader_num_workers: rows are read and images decoded beside the step
exact searched grpo.torch_compile: fewer kernels per step, for a compilation at the start and at every new shape
exact searched speedups: work that TRL does twice is done once
learning named vllm.kv_cache_dtype: keys and values in 8 bits: twice as many completions at once, sampled a little
  differently
learning named vllm.quantization: the engine's base in 8 bits: less memory to read at every token, sampled a little
  differently
learning named grpo.max_completion_length: the longest answer allowed
learning named grpo.beta: without a KL term no reference pass is made
learning named peft.r: the adapter's rank
learning named grpo.steps_per_generation: completions generated at a time, in the user's own micro steps; the later ones
  are from an older policy
learning named grpo.num_iterations: how often each completion is trained on
learning named model.load_in_4bit: base weights in 4 bits: less memory, more arithmetic
learning named prompts_per_step: distinct prompts per optimizer step; accumulation follows
"""
"""Kind, `searched` or only searched where it is `named` in `search.knobs`, key, and why it matters."""


class Ways(NamedTuple):
    """Functions of one knob; `current` where `own_value` does not know the user's own value."""

    find: Callable[[KnobContext, Any], tuple[Any, ...]]  # values around the user's own
    rule: rules.Rule = rules.no_rule
    current: Callable[[RunConfig], Any] | None = None


WAYS = {
    "data.image_size": Ways(values.image_sizes, rules.image_rule),
    "grpo.num_generations": Ways(values.group_sizes, current=lambda config: config.batch.num_generations),
    "grpo.per_device_train_batch_size": Ways(values.micro_batches, current=lambda config: config.batch.micro_batch),
    "vllm.gpu_memory_utilization": Ways(
        engine_knobs.memory_shares, engine_knobs.memory_share_rule, current=engine.share_of
    ),
    "grpo.gradient_checkpointing": Ways(values.switches),
    "model.attn_implementation": Ways(values.kernels, rules.kernel_rule),
    "vllm.max_num_seqs": Ways(engine_knobs.running_counts, engine_knobs.running_rule, engine.running),
    "vllm.max_num_batched_tokens": Ways(engine_knobs.batched_tokens, engine_knobs.batched_rule, engine.batched_tokens),
    "vllm.sleep_level": Ways(engine_knobs.sleep_levels, engine_knobs.sleep_rule, engine.sleep_level),
    "vllm.weight_sync": Ways(engine_knobs.syncs, engine_knobs.sync_rule),
    "vllm.enable_prefix_caching": Ways(values.switches, engine_knobs.colocate_rule),
    "vllm.enable_chunked_prefill": Ways(values.switches, engine_knobs.chunked_rule),
    "vllm.enforce_eager": Ways(values.switches, engine_knobs.colocate_rule),
    "vllm.speculative_config": Ways(engine_knobs.speculations, engine_knobs.speculation_rule),
    "vllm.tensor_parallel_size": Ways(
        engine_knobs.tensor_parallel_sizes, engine_knobs.tensor_parallel_rule, engine.written_tensor_parallel
    ),
    "vllm.server_gpus": Ways(engine_knobs.server_gpus, engine_knobs.server_rule),
    "grpo.use_vllm": Ways(engine_knobs.engines, engine_knobs.engine_rule, lambda config: config.use_vllm),
    "grpo.cache_implementation": Ways(values.caches, rules.cache_rule),
    "grpo.use_transformers_continuous_batching": Ways(values.continuous, rules.continuous_rule),
    "grpo.dataloader_pin_memory": Ways(values.pinning, rules.pin_rule),
    "grpo.dataloader_num_workers": Ways(values.workers, rules.worker_rule),
    "grpo.torch_compile": Ways(values.compiling, rules.compile_rule),
    "speedups": Ways(values.speed_ups),
    "vllm.kv_cache_dtype": Ways(engine_knobs.eight_bits, engine_knobs.cache_type_rule),
    "vllm.quantization": Ways(engine_knobs.eight_bits, engine_knobs.quantized_rule),
    "grpo.max_completion_length": Ways(values.completion_lengths),
    "grpo.beta": Ways(values.betas),
    "peft.r": Ways(values.ranks, rules.adapter_rule, _rank),
    "grpo.steps_per_generation": Ways(
        values.steps_per_generation, current=lambda config: config.batch.steps_per_generation
    ),
    "grpo.num_iterations": Ways(values.iterations),
    "model.load_in_4bit": Ways(values.precisions, rules.four_bit_rule),
    PROMPTS: Ways(values.prompts_per_step, current=_prompts),
}


def _row(text: str) -> Knob:
    words, _, why = text.partition(": ")
    kind, searched, key = words.split()
    ways = WAYS[key]
    current = ways.current or partial(own_value, key)

    def values_of(context: KnobContext) -> tuple[Any, ...]:
        applies = not key.startswith("vllm.") or engine_knobs.colocates(context)
        return ways.find(context, current(context.config)) if applies else ()

    return Knob(
        key, "exact" if kind == "exact" else "learning", why, current, values_of, ways.rule, searched == "searched"
    )


TABLE = tuple(map(_row, ROWS.strip().replace("\n  ", " ").splitlines()))
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
