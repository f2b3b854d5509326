"""Timelines of optimizer steps, from `spans.jsonl` alone: its spans, and bars that can be drawn."""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from grpo_autotune.probe.spans import Span, StepSpans
from grpo_autotune.probe.stages import classify
from grpo_autotune.records.probe import STAGES

LEAST_SHARE = 0.003
"""Share of a step's time below which spans are merged with their neighbours."""
RESOLUTION_S = 1e-6
"""Seconds to which the file rounds."""
STEP = re.compile(r'\{"step": (\d{1,18}),')
Seconds = Annotated[float, Field(ge=0.0, lt=1e9)]  # no step takes more


class _Line(BaseModel):
    """A step as it is stored; a span is its stage, its part, its parent or thread, its start and its length."""

    step: int
    spans: list[tuple[str, str, int, Seconds, Seconds]] = Field(min_length=1)
    other_threads: list[tuple[str, str, int, Seconds, Seconds]]
    samples: list[tuple[Seconds, dict[str, float]]] = []


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
        return self.end - self.begin


def read_spans(path: Path, wanted: Collection[int]) -> dict[int, StepSpans]:
    """The wanted steps that the file holds whole; torn or foreign lines say nothing."""
    steps: dict[int, StepSpans] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (number := STEP.match(line)) and int(number[1]) in wanted:
                    with suppress(ValidationError):
                        steps[int(number[1])] = _step(_Line.model_validate_json(line))
    return steps


def _step(line: _Line) -> StepSpans:
    spans = [
        Span(stage if stage in STAGES else "", part, parent if 0 <= parent < index else -1, index, start, length)
        for index, (stage, part, parent, start, length) in enumerate(line.spans)
    ]
    others = [
        Span(stage if stage in STAGES else "", part, -1, -1, start, length, thread=thread)
        for stage, part, thread, start, length in line.other_threads
    ]
    return StepSpans(line.step, spans, others, line.samples)


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
