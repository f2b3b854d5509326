"""From the steps of another framework's log to a report: what they sum to, what the log's own arithmetic says."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from grpo_autotune.advice.logged import advice, bound
from grpo_autotune.interop.logs.clock import LEFT_OVER, Part, Timed, timed
from grpo_autotune.interop.logs.steps import FACTS, RAY, LoggedSteps
from grpo_autotune.probe.breakdown import half_quartile_range
from grpo_autotune.records.imported import ATOMS, LoggedFact, LoggedStage, LogReport, State

SILENT = ("/min", "num_preempted", "slowest", "ratio")  # no seconds, or nothing that others do not say
STATES: dict[int, State] = {0: "unknown", 1: "known"}
WHOLE = 0.01  # share by which a count that was recovered may miss a whole number

RECOVERED = {  # quantity -> what a step's tokens are divided by
    "completions per step": ("prompt_length/mean", "+", "response_length/mean"),
    "GPUs": ("perf/time_per_step", "x", "perf/throughput"),
}


def read_log(path: Path, numbers: Mapping[str, float] | None = None) -> LogReport:
    """The report of a log, with `numbers` of the configuration held against it. ConfigError where it has no step, or no
    seconds."""
    log = LoggedSteps(path)
    times = timed(log)
    steps = list(times.seconds)
    seconds = list(times.seconds.values())
    step_s = (statistics.median if times.counted == "rollout" else statistics.fmean)(seconds)
    stages = _stages(times, step_s)
    facts: dict[str, LoggedFact] = {}
    told = list(log.values) if times.of_all else steps
    for name, keys in FACTS.items():
        for key, value in [*_means(log, told, keys)][:1]:
            facts[name] = LoggedFact(value=value, key=key)
    facts |= dict(_recovered(log, steps))
    if "reward, mean" not in facts:
        log.warnings.append("no reward in this log: it may be of another kind of training than GRPO")
    report = LogReport(
        file=str(path), framework=times.framework, counted=times.counted, whole=times.whole, step_s=step_s,
        step_spread_s=half_quartile_range(seconds), steps=steps, lines=[log.lines[step] for step in steps],
        step_seconds=seconds, stages=stages, facts=facts,
        absent=[atom for atom in ATOMS if not any(atom in row.holds for row in stages)],
        beside=_beside(log, steps, stages), checks=list(_checks(facts, numbers)) if numbers else [],
        skipped={reason: count for reason, count in log.skipped.items() if count}, warnings=log.warnings, bound="",
    )  # fmt: skip
    return report.model_copy(update={"bound": bound(report), "verdict": advice(report)})


def _stages(times: Timed, step_s: float) -> list[LoggedStage]:
    """A row for each name that a timer of any step has, the longest first; they sum to the step."""
    total = math.fsum(times.seconds.values())
    by_name: dict[str, dict[int, list[Part]]] = {}
    for step in times.seconds:
        for part in times.parts.get(step, ()):
            by_name.setdefault(part.name, {}).setdefault(step, []).append(part)
    rows = []
    for name, steps in by_name.items():
        parts = list(itertools.chain(*steps.values()))
        holds = list(dict.fromkeys(stage for part in parts for stage in part.holds))
        per_step_s = [math.fsum(part.seconds for part in steps.get(step, ())) for step in times.seconds]
        share = math.fsum(per_step_s) / total
        rows.append(LoggedStage(
            name=name, state=STATES.get(len(holds), "lumped"), holds=holds, share=share, self_s=share * step_s,
            keys=list(dict.fromkeys(key for part in parts for key in part.keys)),
            spread=half_quartile_range(per_step_s), per_step_s=per_step_s,
        ))  # fmt: skip
    return sorted(rows, key=lambda row: -row.self_s)


def _means(log: LoggedSteps, steps: Iterable[int], keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    for key in keys:
        if read := [log.values[step][key] for step in steps if key in log.values[step]]:
            yield key, statistics.fmean(read)


def _beside(log: LoggedSteps, steps: list[int], stages: list[LoggedStage]) -> dict[str, LoggedFact]:
    used = {key.removeprefix("-") for row in stages for key in row.keys} | {RAY + key for key in ("step", *LEFT_OVER)}
    keys = {key: None for step in steps for key in log.values[step] if key.startswith(RAY)}
    kept = [key for key in keys if key not in used and not any(word in key for word in SILENT)]
    return {key.removeprefix(RAY): LoggedFact(value=mean, key=key) for key, mean in _means(log, steps, kept)}


def _recovered(log: LoggedSteps, steps: list[int]) -> Iterator[tuple[str, LoggedFact]]:
    """Completions per step and GPUs from each line's tokens, lengths and throughput: the median, if it is whole."""
    for name, (one, sign, other) in RECOVERED.items():
        read = []
        for values in (log.values[step] for step in steps):
            with suppress(KeyError, ZeroDivisionError):
                pair = values[one], values[other]
                read.append(values["perf/total_num_tokens"] / (sum(pair) if sign == "+" else math.prod(pair)))
        count = statistics.median(read or [0.0])
        if count and abs(count - round(count)) <= WHOLE * count:
            yield name, LoggedFact(value=round(count), key=f"perf/total_num_tokens / ({one} {sign} {other})")


def _checks(facts: Mapping[str, LoggedFact], numbers: Mapping[str, float]) -> Iterator[str]:
    ranks = round(numbers["D"])
    wanted = {"completions per step": round(numbers["P"] * numbers["G"]), "GPUs": ranks}
    for name, given in wanted.items():
        if name not in facts:
            yield f"{name}: {given} in the configuration, and nothing in the log to hold it against"
            continue
        seen = round(facts[name].value)
        word = "as in the log" if seen == given else f"the log has {seen}: it is not the configuration of this run"
        if name == "GPUs" and seen != given and seen % given == 0:
            word = f"the log has {seen}, {seen // given} for each of the configuration's data-parallel ranks"
        yield f"{name}: {given} in the configuration, {word}"
