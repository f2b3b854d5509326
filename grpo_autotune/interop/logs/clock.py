"""Seconds of each step of a log, and the rows that they are made of, by what its framework writes."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.logs.steps import SPEEDS, LoggedSteps
from grpo_autotune.interop.logs.timers import OCCASIONS, RAY, Part, is_async, ray_parts

WARM = 1.5  # times the others' median (of optimizer steps, their longest): a first step that takes longer is left out
LEAST_BAR = 5  # looks at a progress bar below which it is one of loading something


@dataclass
class Timed:
    """Seconds by step, and by row where the log's timers add up to the step."""

    framework: str
    counted: str  # what a step is
    whole: str  # where its seconds come from
    seconds: dict[int, float]
    parts: dict[int, list[Part]] = field(default_factory=dict)


def timed(log: LoggedSteps) -> Timed:
    """The seconds of a log's steps; ConfigError where it has no step, or no seconds."""
    keys = {key for values in log.values.values() for key in values}
    result = next(filter(None, (kind(log, keys) for kind in KINDS)), None)
    if result is None or not result.seconds:
        what = f"no seconds in the {len(log.values)} steps of this log" if log.values else "no training step in it"
        fix = "Read are logs of verl, EasyR1, ms-swift and TRL since 0.26 (step_time): docs/interop.md lists the files."
        raise ConfigError(what, where=str(log.path), fix=fix)
    first, *rest = result.seconds
    usual = statistics.median if result.counted == "rollout" else max  # not every optimizer step generates
    if len(rest) >= 2 and result.seconds[first] > WARM * usual(result.seconds[step] for step in rest):
        del result.seconds[first]
        log.skipped["first step, which warms up"] += 1
    return result


def _of(log: LoggedSteps, key: str) -> dict[int, float]:
    return {step: values[key] for step, values in log.values.items() if values.get(key, 0.0) > 0.0}


def _of_ray(log: LoggedSteps, keys: set[str]) -> Timed | None:
    if not any(key.startswith(RAY) for key in keys):
        return None
    whole = f"{RAY}step"
    seconds = _of(log, "perf/time_per_step") | _of(log, whole)
    log.skipped["steps without seconds of the whole (validation alone, or torn)"] += len(log.values) - len(seconds)
    framework = "EasyR1" if {f"{RAY}old", f"{RAY}validation"} & keys else "verl"
    result = Timed(framework, "rollout", whole, seconds)
    if is_async(keys):
        log.warnings.append(
            "an asynchronous trainer's stages run beside each other: its timers are printed as they are"
        )
        return result
    steps = {step: log.values[step] | {whole: spent} for step, spent in seconds.items()}
    plain = [values for values in steps.values() if not any(RAY + key in values for key in OCCASIONS)]
    left = [parts[-1].seconds for values in plain if (parts := ray_parts(values, 0.0))]
    idle_s = statistics.median(left) if left else 0.0
    split = {step: ray_parts(values, idle_s) for step, values in steps.items()}
    result.parts = {step: parts for step, parts in split.items() if parts}
    _keep(log, result, "steps whose timers hold more seconds than they do, or are no numbers")
    return result


def _of_timers(log: LoggedSteps, keys: set[str]) -> Timed | None:
    if not log.parts:
        return None
    seconds, whole = _of(log, "step_time"), "step_time"
    if not seconds:
        seconds, whole = {step: sum(p.seconds for p in parts) for step, parts in log.parts.items()}, "timers of TRL"
        log.warnings.append("no step_time: backward and optimizer are not in these seconds")
    result = Timed("TRL", "optimizer step", whole, seconds, log.parts)
    _keep(log, result, "steps whose timers do not add up to step_time")
    return result


def _keep(log: LoggedSteps, result: Timed, reason: str) -> None:
    """Leave out steps that cannot be split; all are kept, and none is split, where that is most of them."""
    lost = [step for step in result.seconds if step not in result.parts]
    if len(lost) > len(result.seconds) / 2:
        log.warnings.append(f"{len(lost)} of {len(result.seconds)} are {reason}: no breakdown")
        result.parts = {}
        return
    for step in lost:
        del result.seconds[step]
    log.skipped[reason] += len(lost)


def _of_speed(log: LoggedSteps, keys: set[str]) -> Timed | None:
    """Mean speeds since the start as seconds of each step in between; a resumed run starts at its own step."""
    elapsed: dict[int, float] = {}
    start, begun = 0, 0
    for step, values in log.values.items():
        key = next((key for key in SPEEDS if values.get(key)), None)
        if key is None:
            continue
        each = values[key] if key == SPEEDS[0] else 1.0 / values[key]
        counted_from = step - values.get("elapsed_time", (step - start) * each) / each
        if abs(counted_from - start) > 1.0 + 1.0 / each:  # more than a clock of whole seconds may miss
            start = max(0, round(counted_from))
        begun = begun if elapsed else start
        elapsed[step] = (step - start) * each
    whole = "train_speed, times steps, less the entry before"
    return Timed("ms-swift", "optimizer step", whole, _differences(elapsed, begun)) if keys & {*SPEEDS} else None


def _of_step_time(log: LoggedSteps, keys: set[str]) -> Timed | None:
    return Timed("TRL", "optimizer step", "step_time", _of(log, "step_time")) if "step_time" in keys else None


def _of_bars(log: LoggedSteps, keys: set[str]) -> Timed | None:
    bars = [bar for bar in log.bars.values() if len(bar) >= LEAST_BAR]
    if not bars:
        return None
    longest = max(bars, key=lambda bar: max(spent for spent, _ in bar.values()))
    log.lines = {step: line for step, (_, line) in longest.items()}
    seconds = _differences({step: spent for step, (spent, _) in longest.items()})
    whole = "the clock of the progress bar, of whole seconds, less the entry before"
    return Timed("a progress bar", "step of the bar", whole, seconds)


def _of_runtime(log: LoggedSteps, keys: set[str]) -> Timed | None:
    """The mean of a whole run; a console's rows, which may stand for many steps each, do not count its steps."""
    step, spent = next(iter(_of(log, "train_runtime").items()), (0, 0.0))
    rate = log.values[step].get("train_steps_per_second", 0.0) if step else 0.0
    steps = step if abs(spent * rate - step) <= 1.0 + 0.0005 * spent else round(spent * rate)
    return Timed("TRL", "optimizer step", f"train_runtime / {steps} steps", {step: spent / steps}) if steps else None


KINDS = (_of_ray, _of_timers, _of_speed, _of_step_time, _of_bars, _of_runtime)
"""Where seconds come from, the best first."""


def _differences(elapsed: Mapping[int, float], start: int = 0) -> dict[int, float]:
    """Seconds per step between entries of a clock that goes on."""
    seconds, before, at = {}, start, 0.0
    for step, now in sorted(elapsed.items()):
        if step > before and now > at:
            seconds[step] = (now - at) / (step - before)
        before, at = step, now  # a clock that begins again is that of a resumed run
    return seconds
