"""Timelines of optimizer steps, from `spans.jsonl` alone: its spans, and bars that can be drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.probe.spans import Span, StepSpans
from grpo_autotune.probe.stages import classify
from grpo_autotune.records.probe import STAGES

LEAST_SHARE = 0.003
"""Share of a step's time below which spans are merged with their neighbours."""
RESOLUTION_S = 1e-6
"""Seconds to which the file rounds."""
MOST_S = 1e9
"""Seconds that no step takes."""
STEP = re.compile(r'\{"step": (\d{1,18}),')


class Bar(NamedTuple):
    """A stretch of a lane in seconds; `spans` of them are in it, and its stage is the one of the longest."""

    lane: str
    stage: str
    part: str
    begin: float
    end: float
    spans: int = 1

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


def read_spans(path: Path, wanted: Collection[int]) -> dict[int, StepSpans]:
    """The wanted steps that the file holds whole; torn or foreign lines say nothing."""
    steps: dict[int, StepSpans] = {}
    if not path.is_file():
        return steps
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            number = STEP.match(line)
            if number is None or int(number[1]) not in wanted:
                continue
            try:
                steps[int(number[1])] = _step(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return steps


def _step(line: dict[str, Any]) -> StepSpans:
    spans = [
        Span(_stage(stage), str(part), int(parent) if 0 <= parent < index else -1, index, _time(start), _time(length))
        for index, (stage, part, parent, start, length) in enumerate(line["spans"])
    ]
    others = [
        Span(_stage(stage), str(part), -1, -1, _time(start), _time(length), thread=int(thread))
        for stage, part, thread, start, length in line["other_threads"]
    ]
    if not spans:
        raise ValueError("a step without spans")
    samples = [
        (_time(at), {str(key): float(value) for key, value in dict(values).items()})
        for at, values in line.get("samples", [])
    ]
    return StepSpans(int(line["step"]), spans, others, samples)


def _time(value: float) -> float:
    if not 0.0 <= value < MOST_S:
        raise ValueError("not a time within a step")
    return value


def _stage(name: Any) -> str:
    return name if name in STAGES else ""


def bars_of(step: StepSpans, main: str) -> list[Bar]:
    """The main thread's bars in the lane `main`, and a lane for each other thread."""
    least_s = LEAST_SHARE * step.spans[0].host_s
    lanes = [_merged(_flat(step, main), least_s)]
    for number, thread in enumerate(dict.fromkeys(span.thread for span in step.others), start=2):
        spans = sorted((s for s in step.others if s.thread == thread), key=lambda span: span.start_s)
        lane = f"{main}, thread {number}"
        lanes.append([Bar(lane, s.stage or "other", s.part, s.start_s, s.start_s + s.host_s) for s in spans])
    return [bar for lane in lanes for bar in _merged(lane, least_s)]


def _flat(step: StepSpans, lane: str) -> list[Bar]:
    """Each moment as the innermost span's: a span with its children cut out of it."""
    bars: list[Bar] = []
    classes = classify(step.spans)
    at = [span.start_s for span in step.spans]  # how far each span is laid out
    for span in step.spans:
        if (above := span.parent) >= 0:
            bars.append(Bar(lane, *classes[above], at[above], span.start_s))
            at[above] = max(at[above], span.start_s + span.host_s)
    bars += [Bar(lane, *classes[s.index], at[s.index], s.start_s + s.host_s) for s in step.spans]
    return sorted((bar for bar in bars if bar.seconds >= RESOLUTION_S), key=lambda bar: bar.begin)


def _merged(bars: list[Bar], least_s: float) -> list[Bar]:
    """Neighbours of one stage, and runs of bars shorter than `least_s`, as one bar each."""
    merged: list[Bar] = []
    longest = 0.0  # of the stretches that the last bar was made of
    for bar in bars:
        last = merged[-1] if merged else None
        near = last is not None and bar.begin - last.end < least_s
        if last is None or not near or (bar.stage != last.stage and max(bar.seconds, last.seconds) >= least_s):
            merged.append(bar)
            longest = bar.seconds
            continue
        stage = bar.stage if bar.seconds > longest else last.stage
        longest = max(longest, bar.seconds)
        part = last.part if bar.part == last.part else ""
        merged[-1] = Bar(bar.lane, stage, part, last.begin, max(last.end, bar.end), last.spans + bar.spans)
    return merged


def rank_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The name of each rank's lane, and its file of spans."""
    others = sorted(folder.glob("spans.rank*.jsonl"), key=lambda path: (len(path.name), path.name))
    yield "rank 0" if others else "main", folder / "spans.jsonl"
    yield from (("rank " + path.name.removeprefix("spans.rank").removesuffix(".jsonl"), path) for path in others)
