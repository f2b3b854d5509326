"""Stages from spans: a stage's seconds are self time (without its children), so the stages sum to the step.

Evaluation runs the same methods as training, so all that happens inside logging, saving or evaluating counts there.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from grpo_autotune.probe.spans import DeviceTimer, Span, StepSpans
from grpo_autotune.records.probe import STAGES, StageRow, StageTimings

APART = "log_save_eval"
FIRST_USE = "first_use"
"""Part of spans around what is done once in a run (`seams.first_use`): no step's, with all that happens inside."""
ONCE = "other", FIRST_USE
Interval = tuple[float, float]


@dataclass(slots=True)
class StepStages:
    """One optimizer step by stage, without what is done once in a run. Keys of `parts` are (stage, part); `self_s` sums
    to `wall_s`."""

    step: int
    wall_s: float
    self_s: dict[str, float]
    host_s: dict[str, float]
    parts: dict[tuple[str, str], float]
    hidden_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def stages_of(step: StepSpans, timer: DeviceTimer | None = None, *, whole: bool = False) -> StepStages:
    """Sum one step's spans by stage; with `timer`, seconds are the device's, and the host's are kept beside them. A
    `whole` step holds what is done once in a run as well."""
    host = _self_seconds(step.spans, [span.host_s for span in step.spans])
    if timer is None:
        seconds = host
    else:
        device = [timer.seconds(span.begin_mark, span.end_mark) for span in step.spans]
        seconds = _self_seconds(step.spans, device)
    stages = StepStages(step.step, 0.0, defaultdict(float), defaultdict(float), defaultdict(float))
    calls: dict[str, int] = defaultdict(int)
    for span, self_s, host_s, (stage, part) in zip(step.spans, seconds, host, classify(step.spans), strict=True):
        if (stage, part) == ONCE and not whole:
            continue
        stages.self_s[stage] += self_s
        stages.host_s[stage] += host_s
        if part:
            stages.parts[stage, part] += self_s
        stages.peak_bytes[stage] = max(stages.peak_bytes.get(stage, 0), span.peak_bytes)
        calls[stage] += span.calls if stage != "other" else 0
    stages.calls, stages.wall_s = calls, math.fsum(stages.self_s.values())
    stages.hidden_s = _hidden(step)
    return stages


def _self_seconds(spans: Sequence[Span], totals: Sequence[float]) -> list[float]:
    """Each span's seconds minus its children's."""
    seconds = list(totals)
    for span, total in zip(spans, totals, strict=True):
        if span.parent >= 0:
            seconds[span.parent] -= total
    return seconds


def classify(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """Stage and part of each span's self time. Parents come before children in the list."""
    classes: list[tuple[str, str]] = []
    for span in spans:
        above = classes[span.parent] if span.parent >= 0 else ("other", "")
        if above == ONCE or (not span.stage and span.part == FIRST_USE):
            classes.append(ONCE)
        elif above[0] == APART:
            classes.append((APART, span.part if span.stage == APART and above[1] != "evaluate" else above[1]))
        else:
            classes.append((span.stage or "other", span.part))
    return classes


def _hidden(step: StepSpans) -> dict[str, float]:
    """Seconds of other threads' spans during which the main thread was not itself inside that stage."""
    hidden: dict[str, float] = {}
    for stage in {span.stage for span in step.others}:
        busy = union((s.start_s, s.start_s + s.host_s) for s in step.others if s.stage == stage)
        apart = (s for s in step.spans if s.stage == stage or (not s.stage and s.part == FIRST_USE))
        waited = union((s.start_s, s.start_s + s.host_s) for s in apart)
        hidden[stage] = length(busy) - length(intersection(busy, waited))
    return hidden


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that cover the same moments, in order and apart."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Stretches that an interval of each has in common."""
    pairs = ((max(x[0], y[0]), min(x[1], y[1])) for x, y in itertools.product(a, b))
    return [(begin, end) for begin, end in pairs if end > begin]


def length(intervals: Iterable[Interval]) -> float:
    """Their seconds in all."""
    return math.fsum(end - begin for begin, end in intervals)


def summarise(
    steps: Sequence[StepStages], *, warmup: int, cycle: int, on_device: bool, seams: dict[str, list[str]]
) -> StageTimings:
    """The measured steps as one table; the first `warmup` steps are left out unless that would leave none."""
    warmup = warmup if len(steps) > warmup else 0
    kept = steps[warmup:]
    rows = []
    for stage in STAGES:
        parts = sorted({part for step in kept for of, part in step.parts if of == stage})
        calls = sum(step.calls.get(stage, 0) for step in kept)
        rows.append(
            StageRow(
                name=stage,
                per_step_s=[step.self_s.get(stage, 0.0) for step in kept],
                host_s=[step.host_s.get(stage, 0.0) for step in kept] if on_device else None,
                hidden_s=math.fsum(step.hidden_s.get(stage, 0.0) for step in kept) / max(1, len(kept)),
                parts={part: [step.parts.get((stage, part), 0.0) for step in kept] for part in parts},
                calls=calls / max(1, len(kept)),
                seams=seams.get(stage, []),
                peak_bytes=max((step.peak_bytes.get(stage, 0) for step in kept), default=0) or None,
            )
        )
    return StageTimings(
        steps=[step.step for step in kept],
        step_s=[step.wall_s for step in kept],
        warmup_s=[step.wall_s for step in steps[:warmup]],
        stages=rows,
        cycle=cycle,
    )
