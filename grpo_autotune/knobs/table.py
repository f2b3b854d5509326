"""The table of knobs: a row says whether its knob changes what is learned, its values, and why it matters.

Exact knobs change an optimizer step's time and memory and leave its mathematics alone; learning knobs change what is
learned. The split is the one that decides into which tuned file a change may go.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from grpo_autotune.config.foreign_keys import OWN_GRPO_KEYS, grpo_keys, peft_keys
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.section import SearchSection
from grpo_autotune.errors import ConfigError, nearest_path
from grpo_autotune.knobs import engine, engine_knobs, rules, values
from grpo_autotune.knobs.context import KnobContext
from grpo_autotune.knobs.sharding import ZERO_KNOBS, zero_rule, zero_value, zero_values

Kind = Literal["exact", "learning"]

PROMPTS = "prompts_per_step"
"""The one knob that is no key of the configuration: distinct prompts per optimizer step."""
WORKERS = "grpo.dataloader_num_workers"


@dataclass(frozen=True)
class Knob:
    """One row."""

    key: str  # key path in the configuration (`prompts_per_step` is derived: see `PROMPTS`)
    kind: Kind  # `exact` or `learning`; see `kind_of` for the knob that can be either
    around: Callable[[KnobContext, Any], tuple[Any, ...]]  # values around the user's own, which comes first
    rule: rules.Rule = lambda context, value: None  # the reason against a value
    read: Callable[[RunConfig], Any] | None = None  # of the user's own value, where `own_value` does not know it
    why: str = field(kw_only=True)  # its effect on a step
    searched: bool = field(kw_only=True, default=True)  # False if only where it is named in `search.knobs`
    reach: tuple[str, ...] = field(kw_only=True, default=())  # stages that it can make shorter; empty for any

    def current(self, config: RunConfig) -> Any:
        """The user's own value, TRL's default where it is left out."""
        return self.read(config) if self.read else own_value(self.key, config)

    def values(self, context: KnobContext) -> tuple[Any, ...]:
        """Values tried when the user names none, the user's own first; empty where the knob does not apply."""
        applies = not self.key.startswith("vllm.") or engine_knobs.colocates(context)
        return self.around(context, self.current(context.config)) if applies else ()


def grpo_value(name: str, config: RunConfig) -> Any:
    """The user's value of a key of `GRPOConfig`, TRL's default where it is left out."""
    return config.grpo[name] if name in config.grpo else {**grpo_keys(), **OWN_GRPO_KEYS}[name].default_value()


def own_value(key: str, config: RunConfig) -> Any:
    """The user's value of a key, the default of TRL or vLLM where it is left out."""
    section, _, name = key.partition(".")
    if section == "grpo":
        return grpo_value(name, config)
    if section == "rewards":
        return next((item.concurrency for item in config.rewards[int(name.partition(".")[0]) :]), None)
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


def _both(_: KnobContext, own: Any) -> tuple[bool, bool]:
    return values.switch(own)


TABLE = (
    Knob("data.image_size", "learning", values.image_sizes, rules.image_rule,
         why="an image's tokens go with the square of its longest side"),
    Knob("grpo.num_generations", "learning", values.group_sizes, read=lambda config: config.batch.num_generations,
         why="the size of a group, at the same completions per step"),
    Knob("grpo.per_device_train_batch_size", "exact", values.micro_batches,
         read=lambda config: config.batch.micro_batch,
         why="fewer, larger calls; accumulation follows, so that a step trains on the same completions"),
    Knob("vllm.gpu_memory_utilization", "exact", engine_knobs.memory_shares, engine_knobs.memory_share_rule,
         read=engine.share_of, why="memory for the engine's keys and values, taken from the trainer"),
    Knob("grpo.gradient_checkpointing", "exact", _both,
         why="activations are kept instead of computed twice"),
    Knob("model.attn_implementation", "exact", values.kernels, rules.kernel_rule,
         why="the kernel that computes attention"),
    Knob("vllm.max_num_seqs", "exact", engine_knobs.running_counts, engine_knobs.running_rule, engine.running,
         why="completions that are generated at once: fewer leave room to each, more fill the device"),
    Knob("vllm.max_num_batched_tokens", "exact", engine_knobs.batched_tokens, engine_knobs.batched_rule,
         engine.batched_tokens,
         why="tokens of one engine step: larger ones prefill faster and take memory for their activations"),
    Knob("vllm.sleep_level", "exact", engine_knobs.sleep_levels, engine_knobs.sleep_rule, engine.sleep_level,
         why="the engine gives its memory back while weights are trained, for the time of falling asleep and waking"),
    Knob("vllm.weight_sync", "exact", engine_knobs.syncs, engine_knobs.sync_rule,
         why="an adapter is sent in no time and costs at every token; merged weights are sent whole and cost nothing "
         "then"),
    Knob("vllm.enable_prefix_caching", "exact", _both, engine_knobs.colocate_rule, searched=False,
         why="a group's prompt is prefilled once"),
    Knob("vllm.enable_chunked_prefill", "exact", _both, engine_knobs.chunked_rule, searched=False,
         why="long prompts are prefilled beside the tokens of others"),
    Knob("vllm.enforce_eager", "exact", _both, engine_knobs.colocate_rule, searched=False,
         why="no graphs and no compilation: a shorter start, slower tokens"),
    Knob("vllm.speculative_config", "exact", engine_knobs.speculations, engine_knobs.speculation_rule,
         reach=("generation",),
         why="tokens drafted from the text so far and checked together: distributed as without, other draws"),
    Knob("vllm.tensor_parallel_size", "exact", engine_knobs.tensor_parallel_sizes, engine_knobs.tensor_parallel_rule,
         lambda config: config.vllm.tensor_parallel_size or 1,  # GPUs of a server share the model without being told
         why="GPUs that share one engine"),
    Knob("vllm.server_gpus", "exact", engine_knobs.server_gpus, engine_knobs.server_rule,
         why="GPUs of a vLLM server beside the trainer; null is the engine in the training process"),
    Knob("grpo.use_vllm", "learning", engine_knobs.engines, engine_knobs.engine_rule, lambda config: config.use_vllm,
         why="another engine samples, and TRL weighs its samples by how far its log-probs are off"),
    Knob("grpo.cache_implementation", "exact", values.caches, rules.cache_rule, reach=("generation",),
         why="a cache of fixed size, over which `generate` is compiled; no prompt is shared in it"),
    Knob("grpo.use_transformers_continuous_batching", "exact", values.continuous, rules.continuous_rule,
         reach=("generation",), why="`generate` fills the place of a completion that has ended, and pages its cache"),
    Knob("grpo.dataloader_pin_memory", "exact", lambda context, own: values.switch(own) if context.gpus else (own,),
         lambda context, value: "grpo.dataloader_pin_memory true needs a GPU" if value and not context.gpus else None,
         searched=False, reach=("data",),
         why="rows pass through memory that a GPU can read by itself, on a thread of their own"),
    Knob(WORKERS, "exact", values.workers, rules.worker_rule, reach=("data",),
         why="rows are read and images decoded beside the step"),
    *(Knob(f"rewards.{place}.concurrency", "exact", partial(values.concurrencies, place), reach=("reward",),
           why="calls at once of a reward over a network") for place in range(8)),
    Knob("grpo.torch_compile", "exact", values.compiling, rules.compile_rule,
         why="fewer kernels per step, for a compilation at the start and at every new shape"),
    *(Knob(key, "exact", partial(zero_values, key), partial(zero_rule, key), partial(zero_value, key), why=why)
      for key, why in ZERO_KNOBS.items()),
    Knob("speedups", "exact", lambda _, own: (own, "none" if own == "auto" else "auto"),
         why="work that TRL does twice is done once"),
    Knob("vllm.kv_cache_dtype", "learning", engine_knobs.eight_bits, engine_knobs.cache_type_rule, searched=False,
         why="keys and values in 8 bits: twice as many completions at once, sampled a little differently"),
    Knob("vllm.quantization", "learning", engine_knobs.eight_bits, engine_knobs.quantized_rule, searched=False,
         why="the engine's base in 8 bits: less memory to read at every token, sampled a little differently"),
    Knob("grpo.max_completion_length", "learning", values.completion_lengths, searched=False,
         why="the longest answer allowed"),
    Knob("grpo.advantages", "learning", lambda _, own: (own, "group" if own == "rank" else "rank"), searched=False,
         why="ranks within a group in the place of scaled rewards: a reward's scale and outliers do not count"),
    Knob("grpo.beta", "learning", values.betas, searched=False,
         why="without a KL term no reference pass is made"),
    Knob("peft.r", "learning", values.ranks, rules.adapter_rule, _rank, searched=False,
         why="the adapter's rank"),
    Knob("grpo.steps_per_generation", "learning", values.steps_per_generation,
         read=lambda config: config.batch.steps_per_generation, searched=False,
         why="completions generated at a time, in the user's own micro steps; the later ones are from an older policy"),
    Knob("grpo.num_iterations", "learning", lambda _, own: (own, *(n for n in (1, 2) if n != own)), searched=False,
         why="how often each completion is trained on"),
    Knob("model.load_in_4bit", "learning",
         lambda context, own: values.switch(own) if context.config.lora is not None and context.gpus else (own,),
         rules.four_bit_rule, searched=False,
         why="base weights in 4 bits: less memory, more arithmetic"),
    Knob(PROMPTS, "learning", values.prompts_per_step, read=_prompts, searched=False,
         why="distinct prompts per optimizer step; accumulation follows"),
)  # fmt: skip
BY_KEY = {row.key: row for row in TABLE}
REACH = {row.key: row.reach for row in TABLE if row.reach}
"""Stages that a knob can make shorter; a knob that is not here may reach any."""


def check_keys(search: SearchSection) -> None:
    """Refuse a key of `search.knobs` or `search.accept` that is no knob; ConfigError as `knob`."""
    for section, keys in (("knobs", search.knobs), ("accept", search.accept)):
        for key in keys:
            knob(key, f"search.{section}.{key}")


def knob(key: str, where: str | None = None) -> Knob:
    """The row of a key, which stands at `where` in the configuration; ConfigError, with the nearest, without one."""
    if key in BY_KEY:
        return BY_KEY[key]
    near = nearest_path(key, list(BY_KEY))
    fix = f"{f'Nearest: {near}. ' if near else ''}Known: {', '.join(BY_KEY)}."
    raise ConfigError("this knob does not exist", where=where or key, fix=fix)
