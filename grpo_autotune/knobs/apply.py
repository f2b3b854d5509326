"""A configuration with knobs turned. What exact knobs promise holds whatever is asked for:

    completions per optimizer step = micro batch x accumulation x world size     (kept, unless prompts per step change)
    completions per generation     = micro batch x steps per generation x world size

so accumulation and steps per generation follow the micro batch, and evaluation stays as the user had it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.vllm import VllmSection
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import Given, given
from grpo_autotune.knobs.table import PROMPTS, Kind, knob
from grpo_autotune.records.probe import ProbeRecord

Knobs = dict[str, Any]
"""Key path -> value."""

GROUP = "grpo.num_generations"
MICRO = "grpo.per_device_train_batch_size"
STEPS = "grpo.steps_per_generation"
SLEEP = "vllm.sleep_level"
SERVER = "vllm.server_gpus"
BATCH_KNOBS = frozenset({GROUP, MICRO, STEPS, PROMPTS})


def with_knobs(config: RunConfig, knobs: Knobs) -> RunConfig:
    """The configuration with these knobs turned; equal to `config` where all have the user's own values.

    Engine keys are left out where `grpo.use_vllm` ends up false.

    Raises:
        ConfigError: A key is no knob, a value is of a wrong type, or the numbers of the batch do not fit together; the
            message names the rule.
    """
    turned = {key: value for key, value in knobs.items() if not same_value(value, knob(key).own(config))}
    if GROUP in turned and knobs.get(PROMPTS) is not None:
        turned[PROMPTS] = knobs[PROMPTS]  # prompts are kept, and so completions change with the group
    values = config.to_dict()
    if turned:
        values.pop("receipt", None)  # it tells of another configuration
    _turn_batch(values, config, {key: turned.pop(key) for key in list(turned) if key in BATCH_KNOBS})
    uses_vllm = turned.get("grpo.use_vllm", config.use_vllm)
    for key, value in turned.items():
        section, _, name = key.rpartition(".")
        if section == "vllm" and not uses_vllm:
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
    """The user's own values, TRL's defaults where they are left out.

    Raises:
        ConfigError: A key is no knob.
    """
    return {key: knob(key).own(config) for key in keys}


def kind_of(config: RunConfig, key: str, record: ProbeRecord | None = None) -> Kind:
    """Whether turning a knob changes what is learned. The micro batch does where the loss depends on how a step is
    split into micro batches.

    Raises:
        ConfigError: The key is no knob.
    """
    row = knob(key)
    if key == MICRO and partition_matters(given(config, record=record)):
        return "learning"
    return row.kind


def partition_matters(known: Given) -> str:
    """What in the loss depends on the split into micro batches, in words; empty where nothing does.

    `bnpo` divides by each micro batch's tokens, the entropy quantile is taken within one, the entropy bonus is a mean
    over one, and so is the experts' balance term (`_compute_loss` in trl/trainer/grpo_trainer.py).
    """
    grpo = known.config.grpo
    quantile = grpo.get("top_entropy_quantile")
    balance = grpo.get("router_aux_loss_coef")
    reasons = {
        "the loss type bnpo": grpo.get("loss_type") == "bnpo",
        "top_entropy_quantile": quantile is not None and quantile < 1.0,
        "the entropy bonus": bool(grpo.get("entropy_coef") or grpo.get("use_adaptive_entropy")),
        "the experts' balance term": known.experts and balance != 0.0,
    }
    return " and ".join(name for name, holds in reasons.items() if holds)


def same_value(left: Any, right: Any) -> bool:
    """Whether two knob values are one and the same: 2 and 2.0 are, 1 and true are not."""
    return (type(left) is type(right) and bool(left == right)) or (_number(left) and _number(right) and left == right)


def why_not(config: RunConfig, knobs: Knobs, machine: Machine, record: ProbeRecord | None = None) -> str | None:
    """The rule that makes a combination illegal, in one sentence; None for a legal one.

    Memory is no rule of this function: the models judge it.
    """
    try:
        turned = with_knobs(config, knobs)
        values = knobs_of(config, knobs)
    except ConfigError as error:
        return str(error)
    known = given(turned, machine, record)
    for key, value in knobs.items():
        if same_value(value, values[key]):
            continue
        reason = knob(key).rule(known, value)
        if reason is not None:
            return f"{reason}."
    return None


def _turn_batch(values: dict[str, Any], config: RunConfig, turned: Knobs) -> None:
    """Write the batch's keys that change, on one device: T completions a step, D a generation, M a micro batch."""
    if not turned:
        return
    plan = config.batch
    T, D = plan.micro_batch * plan.accumulation, plan.micro_batch * plan.steps_per_generation
    group, micro = turned.get(GROUP, plan.num_generations), turned.get(MICRO, plan.micro_batch)
    for key, count in (
        (GROUP, group),
        (MICRO, micro),
        (STEPS, turned.get(STEPS, 1)),
        (PROMPTS, turned.get(PROMPTS, 1)),
    ):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"{count!r} is not a positive whole number", where=key)
    if STEPS in turned:
        D = plan.micro_batch * turned[STEPS]
    if PROMPTS in turned:
        T_new = _divided(turned[PROMPTS] * group, plan.processes, PROMPTS, "completions a step", "world size")
        D = _divided(
            D * T_new, T, PROMPTS, "completions a generation, kept in proportion to a step's,", "those of a step"
        )
        T = T_new
    accumulation = _divided(T, micro, MICRO, "completions a step on a device", "per_device_train_batch_size")
    steps = _divided(D, micro, MICRO, "completions a generation on a device", "per_device_train_batch_size")
    grpo = _section(values, "grpo")
    _write(grpo, "num_generations", group, plan.num_generations)
    _write(grpo, "per_device_train_batch_size", micro, plan.micro_batch)
    _write(grpo, "gradient_accumulation_steps", accumulation, plan.accumulation)
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


def _write(grpo: dict[str, Any], name: str, value: int, own: int) -> None:
    if value != own:
        grpo[name] = value


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    if not name:
        return values
    section: dict[str, Any] = values.setdefault(name, {})
    return section


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
