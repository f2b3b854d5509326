"""A configuration with knobs applied. The promise of exact knobs holds whatever is asked for:

    completions per optimizer step = micro batch x accumulation x world size     (kept, unless prompts per step change)
    completions per generation     = micro batch x steps per generation x world size

so accumulation and steps per generation follow the micro batch, and evaluation stays as the user had it.
"""

from collections.abc import Iterable
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.vllm import VllmSection
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import context_of
from grpo_autotune.knobs.sharding import ZERO_KNOBS, turned
from grpo_autotune.knobs.table import PROMPTS, Kind, grpo_value, knob
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.seams.loss import LOSS_KEYS, micro_batch_terms_of_keys

Knobs = dict[str, Any]
"""Key path -> value."""

GROUP = "grpo.num_generations"
MICRO = "grpo.per_device_train_batch_size"
STEPS = "grpo.steps_per_generation"
SLEEP = "vllm.sleep_level"
SERVER = "vllm.server_gpus"
BATCH_KNOBS = frozenset({GROUP, MICRO, STEPS, PROMPTS})


def with_knobs(config: RunConfig, knobs: Knobs) -> RunConfig:
    """The configuration with these knobs applied; equal to `config` where all have the user's own values. Engine keys
    are left out where `grpo.use_vllm` ends up false. ConfigError, which names the rule, where a key is no knob, a value
    is of a wrong type, or the numbers of the batch do not fit together."""
    applied = {key: value for key, value in knobs.items() if not same_value(value, knob(key).current(config))}
    if GROUP in applied and knobs.get(PROMPTS) is not None:
        applied[PROMPTS] = knobs[PROMPTS]  # prompts are kept, and so completions change with the group
    values = config.to_dict()
    if applied:
        values.pop("receipt", None)  # it tells of another configuration
    _apply_batch(values, config, {key: applied.pop(key) for key in list(applied) if key in BATCH_KNOBS})
    uses_vllm = applied.get("grpo.use_vllm", config.use_vllm)
    for key, value in applied.items():
        section, _, name = key.rpartition(".")
        if section == "vllm" and not uses_vllm:
            continue
        if key in ZERO_KNOBS:
            grpo = _section(values, "grpo")
            grpo["deepspeed"] = turned(grpo.get("deepspeed"), key, value)
            continue
        if section == "peft" and values.get("peft") is None:
            raise ConfigError("there is no peft section", where=key, fix="Leave this knob out.")
        _section(values, section)[name] = value
        if key == SLEEP:
            values["vllm"].pop("enable_sleep_mode", None)  # the level says it
        if key == SERVER:
            values["vllm"].pop("mode", None)  # the number says it
    if not uses_vllm and config.vllm != VllmSection():
        values.pop("vllm")
    return RunConfig.from_dict(values)


def knobs_of(config: RunConfig, keys: Iterable[str]) -> Knobs:
    """The user's own values, TRL's defaults where they are left out; ConfigError for a key that is no knob."""
    return {key: knob(key).current(config) for key in keys}


def kind_of(config: RunConfig, key: str, record: ProbeRecord | None = None) -> Kind:
    """`learning` if another value of a knob changes what is learned, as the micro batch does where the loss depends on
    how a step is split into micro batches, else `exact`; ConfigError for a key that is no knob."""
    row = knob(key)
    if key == MICRO:
        loss = {name: grpo_value(name, config) for name in LOSS_KEYS}
        return "learning" if micro_batch_terms_of_keys(loss, context_of(config, record=record).model) else row.kind
    return row.kind


def same_value(left: Any, right: Any) -> bool:
    """True if two knob values are one and the same: 2 and 2.0 are, 1 and true are not."""
    return (type(left) is type(right) and bool(left == right)) or (_number(left) and _number(right) and left == right)


def why_not(config: RunConfig, knobs: Knobs, machine: Machine | None, record: ProbeRecord | None = None) -> str | None:
    """The rule that a combination breaks, in one sentence; None for a legal one. Memory is left to the models."""
    try:
        changed, baseline = with_knobs(config, knobs), knobs_of(config, knobs)
    except ConfigError as error:
        return str(error)
    known = context_of(changed, machine, record)
    for key, value in knobs.items():
        if same_value(value, baseline[key]):
            continue
        if (reason := knob(key).rule(known, value)) is not None:
            return f"{reason}."
    return None


def _apply_batch(values: dict[str, Any], config: RunConfig, applied: Knobs) -> None:
    """Write the keys of the batch that change, on one device: T completions per step, D per generation."""
    if not applied:
        return
    plan = config.batch
    T, D = plan.micro_batch * plan.accumulation, plan.micro_batch * plan.steps_per_generation
    group, micro = applied.get(GROUP, plan.num_generations), applied.get(MICRO, plan.micro_batch)
    for key, count in (
        (GROUP, group),
        (MICRO, micro),
        (STEPS, applied.get(STEPS, 1)),
        (PROMPTS, applied.get(PROMPTS, 1)),
    ):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{count!r} is not a positive whole number", where=key)
    if STEPS in applied:
        D = plan.micro_batch * applied[STEPS]
    if PROMPTS in applied:
        T_new = _divided(applied[PROMPTS] * group, plan.processes, PROMPTS, "completions per step", "world size")
        D = _divided(
            D * T_new, T, PROMPTS, "completions per generation, kept in proportion to a step's,", "those of a step"
        )
        T = T_new
    accumulation = _divided(T, micro, MICRO, "completions per step and device", "per_device_train_batch_size")
    steps = _divided(D, micro, MICRO, "completions per generation and device", "per_device_train_batch_size")
    grpo = _section(values, "grpo")
    for name, value, before in (
        ("num_generations", group, plan.num_generations),
        ("per_device_train_batch_size", micro, plan.micro_batch),
        ("gradient_accumulation_steps", accumulation, plan.accumulation),
    ):
        grpo |= {} if value == before else {name: value}
    if grpo.get("generation_batch_size") is not None:
        grpo["generation_batch_size"] = D * plan.processes
    elif grpo.get("steps_per_generation") is not None or steps != accumulation:
        grpo["steps_per_generation"] = steps
    if plan.eval_batch is not None and group != plan.num_generations and grpo.get("num_generations_eval") is None:
        grpo["num_generations_eval"] = plan.eval_generations


def _divided(number: int, by: int, where: str, number_words: str, by_words: str) -> int:
    whole, rest = divmod(number, by)
    if rest:
        raise ConfigError(f"the {number} {number_words} are not a multiple of {by_words} {by}", where=where)
    return whole


def _section(values: Any, path: str) -> Any:
    section = values
    for name in path.split(".") if path else ():
        if isinstance(section, list) and int(name) >= len(section):
            raise ConfigError(f"there are {len(section)} rewards, counted from 0", where=path)
        section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
    return section


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
