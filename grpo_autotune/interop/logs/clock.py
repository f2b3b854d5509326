"""Seconds of each step of a log, and the rows that they are made of: stages that each timer of verl or EasyR1 holds."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.logs.steps import RAY, SPEEDS, TORN_TIMER, LoggedSteps
from grpo_autotune.records.imported import TRAINING_PASS

WARM = 1.5  # times the others' median (of optimizer steps, their longest): a first step that takes longer is left out
SLACK, ROUNDED_S = 0.001, 0.002  # share of a step, and seconds of rounding, by which timers may exceed it
OCCASIONS = {"save_checkpoint", "testing", "validation"}
ALONE = {  # timer of verl or EasyR1 -> its row, and the stages that it holds
    "old_log_prob": ("policy_logprob", "policy_logprob.old_policy"),
    "old": ("policy_logprob", "policy_logprob.old_policy"),
    "ref": ("reference_logprob", "reference_logprob"),
    "RefPolicy": ("reference_logprob", "reference_logprob"),
    "reward": ("reward", "reward"),
    "update_actor": (TRAINING_PASS, "policy_logprob.training_forward", "backward", "optimizer", "sync_wait"),
    "update_weights": ("weight_sync", "weight_sync", "engine"),
    "values": ("critic's values", "critic's values"),
    "update_critic": ("critic's training", "critic's training"),
}
LEFT_OVER = {"start_profile", "stop_profile", "dump_rollout_generations"}
INSIDE = {"step", "gen", "generate_sequences", "reshard", "adv"} | OCCASIONS | LEFT_OVER | set(ALONE)
OVERLAP = ("param_sync", "wait_for_enough_samples", "generate_async", "sync_rollout_weights", "switch_")
"""Timers of asynchronous trainers: their stages run beside each other, so nothing adds up to a step."""
LEAST_WAIT = 0.01


class Part(NamedTuple):
    """A row's seconds in one step."""

    name: str
    holds: tuple[str, ...]
    keys: tuple[str, ...]
    seconds: float


def is_async(keys: Iterable[str]) -> bool:
    """True for the timers of an asynchronous trainer."""
    return any(key.startswith("fully_async/") or key.rpartition("/")[2].startswith(OVERLAP) for key in keys)


def ray_parts(values: Mapping[str, float], idle_s: float) -> list[Part] | None:
    """The rows of a step of verl or EasyR1, `other` last, which sum to `timing_s/step`; None where its timers hold
    more. Saving and evaluating count where the step has room for them beside `idle_s`, the others' rest."""
    timers = {key.removeprefix(RAY): spent for key, spent in values.items() if key.startswith(RAY)}
    step_s, parts = timers["step"], [*_generation(timers)]
    parts += [Part(ALONE[k][0], ALONE[k][1:], (RAY + k,), spent) for k, spent in timers.items() if k in ALONE]
    if "adv" in timers:  # where no timer of its own waits for the rewards, this one does
        waits = timers["adv"] > LEAST_WAIT * step_s > timers.get("reward", 0.0)
        parts.append(Part("adv", ("other", "reward") if waits else ("other",), (f"{RAY}adv",), timers["adv"]))
    room = step_s * (1.0 + SLACK) + ROUNDED_S - sum(part.seconds for part in parts)
    named = [Part(k, (), (RAY + k,), s) for k, s in timers.items() if "/" not in k and k not in INSIDE]
    if named and sum(part.seconds for part in named) <= room:
        parts, room = parts + named, room - sum(part.seconds for part in named)
    for key in sorted(OCCASIONS & timers.keys()):
        if timers[key] <= room and room - idle_s > timers[key] / 2.0:
            parts.append(Part("log_save_eval", ("log_save_eval",), (RAY + key,), timers[key]))
            room -= timers[key]
    taken = tuple(f"-{key}" for part in parts for key in part.keys)
    rest = step_s - sum(part.seconds for part in parts)
    parts.append(Part("other", ("other",), (f"{RAY}step", *taken), max(0.0, rest)))
    return parts if room >= 0.0 and TORN_TIMER not in values else None


def _generation(timers: Mapping[str, float]) -> Iterator[Part]:
    """`gen`, cut where the version tells the push of the weights apart."""
    if "gen" not in timers:
        return
    whole, slowest, reshard = timers["gen"], timers.get("generation_timing/max"), timers.get("reshard")
    in_loop = any(key.startswith("agent_loop/") for key in timers)
    if slowest is not None and slowest <= whole and not in_loop and "update_weights" not in timers:
        yield Part("generation", ("generation",), (f"{RAY}generation_timing/max",), slowest)
        keys = (f"{RAY}gen", f"-{RAY}generation_timing/max")  # both switches of the worker around its generation
        yield Part("weight_sync", ("weight_sync", "engine"), keys, whole - slowest)
    elif reshard is not None and reshard <= whole:
        yield Part("generation", ("generation", "prompt"), (f"{RAY}gen", f"-{RAY}reshard"), whole - reshard)
        yield Part("weight_sync", ("weight_sync", "engine"), (f"{RAY}reshard",), reshard)
    else:
        streamed = any(key.startswith("agent_loop/compute_score") for key in timers)
        pushed = () if "update_weights" in timers else ("weight_sync", "engine")
        data = ("data",) if {"old", "validation"} & timers.keys() else ()  # EasyR1 draws its batches in there
        holds = ("generation", "prompt", *pushed, *data, *(["reward"] if streamed else []))
        yield Part("generation", holds, (f"{RAY}gen",), whole)


@dataclass
class Timed:
    """Seconds by step, and by row where the log's timers add up to the step."""

    framework: str
    counted: str  # what a step is
    whole: str  # where its seconds come from
    seconds: dict[int, float]
    parts: dict[int, list[Part]] = field(default_factory=dict)
    of_all: bool = False  # the one number is the mean of all steps, whose rows have the rest


def timed(log: LoggedSteps) -> Timed:
    """The seconds of a log's steps; ConfigError where it has no step, or no seconds."""
    keys = {key for values in log.values.values() for key in values}
    kinds = (_of_ray, _of_speed, _of_trl)  # where seconds come from, the best first
    result = next(filter(None, (kind(log, keys) for kind in kinds)), None)
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
    is_easyr1 = {f"{RAY}old", f"{RAY}validation"} & keys
    result = Timed("EasyR1" if is_easyr1 else "verl", "rollout", whole, seconds)
    if is_async(keys):
        what = "an asynchronous trainer's stages run beside each other: its timers are printed as they are"
        log.warnings.append(what)
        return result
    steps = {step: log.values[step] | {whole: spent} for step, spent in seconds.items()}
    plain = [values for values in steps.values() if not any(RAY + key in values for key in OCCASIONS)]
    left = [parts[-1].seconds for values in plain if (parts := ray_parts(values, 0.0))]
    idle_s = statistics.median(left) if left else 0.0
    split = {step: parts for step, values in steps.items() if (parts := ray_parts(values, idle_s))}
    lost, reason = len(seconds) - len(split), "steps whose timers hold more seconds than they do, or are no numbers"
    if lost > len(seconds) / 2:
        log.warnings.append(f"{lost} of {len(seconds)} are {reason}: no breakdown")
        return result
    log.skipped[reason] += lost
    result.seconds, result.parts = {step: seconds[step] for step in split}, split
    return result


def _of_speed(log: LoggedSteps, keys: set[str]) -> Timed | None:
    """Mean speeds since the start as seconds of each step in between; a resumed run starts at its own step."""
    seconds: dict[int, float] = {}
    start, before, at = 0, -1, 0.0
    for step, values in log.values.items():
        key = next((key for key in SPEEDS if values.get(key)), None)
        if key is None:
            continue
        each = values[key] if key == SPEEDS[0] else 1.0 / values[key]
        counted_from = step - values.get("elapsed_time", (step - start) * each) / each
        if abs(counted_from - start) > 1.0 + 1.0 / each:  # more than a clock of whole seconds may miss
            start = max(0, round(counted_from))
        before, now = start if before < 0 else before, (step - start) * each
        if step > before and now > at:
            seconds[step] = (now - at) / (step - before)
        before, at = step, now  # a clock that begins again is that of a resumed run
    whole = "train_speed, times steps, less the entry before"
    return Timed("ms-swift", "optimizer step", whole, seconds) if keys & {*SPEEDS} else None


def _of_trl(log: LoggedSteps, keys: set[str]) -> Timed | None:
    """Each step's own, or the mean of a whole run, whose rows of a console may stand for many steps each."""
    if "step_time" in keys:
        return Timed("TRL", "optimizer step", "step_time", _of(log, "step_time"))
    step, spent = next(iter(_of(log, "train_runtime").items()), (0, 0.0))
    rate = log.values[step].get("train_steps_per_second", 0.0) if step else 0.0
    steps = step if abs(spent * rate - step) <= 1.0 + 0.0005 * spent else round(spent * rate)
    whole = f"train_runtime / {steps} steps"
    return Timed("TRL", "optimizer step", whole, {step: spent / steps}, of_all=True) if steps else None
