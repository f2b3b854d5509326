"""Knobs of the table at neighbouring values, and the seconds and memory that the models predict for each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_autotune.advice.facts import Facts
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs import TABLE, Knobs, context_of, engine, knob, with_knobs
from grpo_autotune.knobs.apply import BATCH_KNOBS, MICRO, SLEEP, same_value, why_not
from grpo_autotune.knobs.sharding import STAGE, ZERO_KNOBS
from grpo_autotune.knobs.table import Knob
from grpo_autotune.predict.objective import useful_per_step
from grpo_autotune.predict.room import fits
from grpo_autotune.predict.workload import shape_of
from grpo_autotune.records.probe import STAGES
from grpo_autotune.records.report import Change

FALL_SHARE = 0.05
"""A stage is concerned by a change if it has this part of all seconds that the change takes off the stages."""
HUNGRY = {MICRO, "grpo.gradient_checkpointing", STAGE}
"""Knobs that take memory for speed: what they take is known where the architecture has formulas."""


@dataclass(frozen=True)
class Neighbour:
    """A configuration one change away from the base, as the models see it."""

    knobs: Knobs
    config: RunConfig  # the base with the knobs changed
    saving_s: float  # predicted seconds per step of the base less those of `config`
    before: dict[str, float]  # stage -> predicted seconds per step of the base; `after` of `config`
    after: dict[str, float]
    useful_ratio: float  # useful completions per second over the base's
    more_bytes: float  # predicted peak of memory less the base's

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that get shorter."""
        falls = {name: s - self.after.get(name, 0.0) for name, s in self.before.items()}
        least = FALL_SHARE * sum(fall for fall in falls.values() if fall > 0.0)
        return tuple(name for name in STAGES if falls.get(name, 0.0) > least)


def neighbours(facts: Facts) -> Iterator[tuple[Knob, list[Neighbour]]]:
    """Every knob that can be turned here, with its legal values other than the base's own that are likely to fit."""
    base, machine = facts.base, facts.machine
    if base is None or machine is None or facts.models is None:
        return
    known = context_of(base, machine, facts.record)
    for row in TABLE:
        is_recorded = not row.key.startswith("vllm.") and row.key != "grpo.torch_compile"
        if facts.config is None and (not is_recorded or base.search.knobs.get(row.key, []) is None):
            continue  # nobody knows its value in a trainer that somebody else built
        value = row.current(base)
        others = [other for other in row.values(known) if not same_value(other, value)]
        nearby = [near for other in others if (near := neighbour(facts, {row.key: other})) is not None]
        yield row, nearby


def neighbour(facts: Facts, knobs: Knobs, *, legal: bool = False, config: RunConfig | None = None) -> Neighbour | None:
    """Ask the models about changed knobs, or a `config` that no knob leads to; None without models, for what is illegal
    unless it is to be taken as `legal` (what stands in its way is a package to install), and for what may not fit."""
    base, machine, models = facts.base, facts.machine, facts.models
    if base is None or machine is None or models is None:
        return None
    if HUNGRY & knobs.keys() and shape_of(facts.record) is None:
        return None
    if not legal and why_not(base, knobs, machine, facts.record) is not None:
        return None
    config = config or with_knobs(base, knobs)
    if SLEEP in knobs and not _side_by_side(facts, config):
        return None
    more_bytes = models.peak_bytes(config, worst_case=True).value - models.peak_bytes(base, worst_case=True).value
    if more_bytes > 0.0 and not fits(models, config, facts.memory_bytes()):
        return None
    before, after = ({name: p.value for name, p in models.stages_s(c).items()} for c in (base, config))
    step_s = models.step_s(base).value, models.step_s(config).value
    truncated = facts.record.tokens.truncated_share if facts.record.tokens else 0.0
    useful = [useful_per_step(c, facts.living, truncated) for c in (base, config)]
    ratio = useful[1] / useful[0] * step_s[0] / step_s[1] if useful[0] > 0.0 else 1.0
    return Neighbour(knobs, config, step_s[0] - step_s[1], before, after, ratio, more_bytes)


def changes(facts: Facts, near: Neighbour) -> tuple[Change, ...]:
    """The keys of the configuration to set, those that follow from the knobs included."""
    base = facts.base
    assert base is not None
    values = {key: (knob(key).current(base), value) for key, value in near.knobs.items() if key not in BATCH_KNOBS}
    if SLEEP in values and base.vllm.enable_sleep_mode is not None:  # the two keys have to agree
        values = {"vllm.enable_sleep_mode": (base.vllm.enable_sleep_mode, near.knobs[SLEEP] > 0)}
    if ZERO_KNOBS.keys() & near.knobs.keys() and isinstance(base.grpo["deepspeed"], str):
        values = {"grpo.deepspeed": (base.grpo["deepspeed"], near.config.grpo["deepspeed"])}
    old, new, plan = base.grpo, near.config.grpo, base.batch
    defaults = {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "num_generations": plan.num_generations,
    }
    for name in new if BATCH_KNOBS & near.knobs.keys() else ():
        if new[name] != old.get(name):
            values[f"grpo.{name}"] = old.get(name, defaults.get(name)), new[name]
    return tuple(Change(key=key, before=_plain(before), after=_plain(after)) for key, (before, after) in values.items())


def _side_by_side(facts: Facts, config: RunConfig) -> bool:
    """True if an engine that stays awake leaves room for the trainer's measured peak, which may not hold the
    engine's memory: that comes from an allocator of its own."""
    peak, memory = facts.peak_bytes(), facts.memory_bytes()
    if engine.sleep_level(config) > 0 or peak is None or memory is None:
        return True
    return engine.share_of(config) * memory + peak <= memory


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
