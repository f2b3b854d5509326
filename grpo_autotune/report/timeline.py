"""Timelines of optimizer steps, from `spans.jsonl` alone: seconds by stage, and bars that can be drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_autotune.probe.spans import Span, StepSpans
from grpo_autotune.probe.stages import classify, stages_of
from grpo_autotune.records.probe import STAGES

LEAST_SHARE = 0.003
"""Share of a step's time below which spans are merged with their neighbours."""
RESOLUTION_S = 1e-6
"""Seconds to which the file rounds."""
MOST_S = 1e9
"""Seconds that no step takes."""
STEP = re.compile(r'\{"step": (\d{1,18}),')


@dataclass(frozen=True)
class Bar:
    """A stretch of a lane; `count` spans are in it, and its stage is the one that most of it belongs to."""

    lane: str
    stage: str
    part: str
    start_s: float
    end_s: float
    count: int = 1

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s


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


def stage_seconds(step: StepSpans) -> dict[str, float]:
    """Seconds of each stage on the host's clock."""
    return {stage: seconds for stage, seconds in stages_of(step).self_s.items() if seconds > 0.0}


def bars_of(step: StepSpans, main: str) -> list[Bar]:
    """The main thread's bars in the lane `main`, and a lane for each other thread."""
    whole = step.spans[0].host_s
    bars = _merged(_merged(_flat(step, main), LEAST_SHARE * whole), LEAST_SHARE * whole)
    threads = {thread: number for number, thread in enumerate(dict.fromkeys(s.thread for s in step.others), start=2)}
    for thread, number in threads.items():
        lane = f"{main}, thread {number}"
        rows = [
            Bar(lane, s.stage or "other", s.part, s.start_s, s.start_s + s.host_s)
            for s in sorted(step.others, key=lambda span: span.start_s)
            if s.thread == thread
        ]
        bars += _merged(rows, LEAST_SHARE * whole)
    return bars


def _flat(step: StepSpans, lane: str) -> list[Bar]:
    """Each moment as the innermost span's: a span with its children cut out of it."""
    classes = classify(step.spans)
    edges: list[tuple[float, float, int]] = []
    ends = [span.start_s + span.host_s for span in step.spans]
    at = [span.start_s for span in step.spans]  # how far each span is laid out
    for index, span in enumerate(step.spans):
        if span.parent >= 0:
            edges.append((at[span.parent], span.start_s, span.parent))
            at[span.parent] = max(at[span.parent], ends[index])
    edges += [(begin, end, index) for index, (begin, end) in enumerate(zip(at, ends, strict=True))]
    return [
        Bar(lane, *classes[index], begin, end) for begin, end, index in sorted(edges) if end - begin >= RESOLUTION_S
    ]


def _merged(bars: list[Bar], least_s: float) -> list[Bar]:
    """Neighbours of one stage, and runs of bars shorter than `least_s`, as one bar each."""
    merged: list[Bar] = []
    longest = 0.0  # of the stretches that the last bar was made of
    for bar in bars:
        last = merged[-1] if merged else None
        near = last is not None and bar.start_s - last.end_s < least_s
        if last is None or not near or (bar.stage != last.stage and max(bar.seconds, last.seconds) >= least_s):
            merged.append(bar)
            longest = bar.seconds
            continue
        lead = bar if bar.seconds > longest else last
        longest = max(longest, bar.seconds)
        part = last.part if bar.part == last.part else ""
        merged[-1] = Bar(bar.lane, lead.stage, part, last.start_s, max(last.end_s, bar.end_s), last.count + bar.count)
    return merged


def rank_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The name of each rank's lane, and its file of spans."""
    others = sorted(folder.glob("spans.rank*.jsonl"), key=lambda path: (len(path.name), path.name))
    yield "rank 0" if others else "main", folder / "spans.jsonl"
    yield from (("rank " + path.name.removeprefix("spans.rank").removesuffix(".jsonl"), path) for path in others)
