"""`trace.json.gz`: the spans of a run as ui.perfetto.dev and speedscope open them, in the Chrome trace format.

A process for each rank, a track for its main thread with nested slices, named as the report's stages are, and async
slices for work on other threads, which overlaps; memory and use of processor and GPU are counters. Times are the
host's, steps stand end to end. A slice's category is its stage: less what is nested in them, the slices of a category last as
long as the report says of the stage on the host's clock (`mean_s`, or `host_s` on a GPU, times the steps).
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_autotune.console import as_warning
from grpo_autotune.files import write_whole
from grpo_autotune.probe.spans import StepSpans
from grpo_autotune.probe.stages import classify
from grpo_autotune.report.timeline import rank_files, read_spans

TRACE_FILE = "trace.json.gz"
EVERY_STEP = range(10**18)
COUNTERS = ("rss_bytes", "gpu_memory_bytes", "cpu_percent", "gpu_percent", "power_w")
MAIN = 1
"""Number of the main thread's track."""

Event = dict[str, Any]


@as_warning("no trace")
def keep_trace(folder: Path) -> None:
    """Write the trace of the spans in `folder`, beside what was measured and saved already; nothing without spans."""
    packed, count = io.BytesIO(), 0
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(b'{"displayTimeUnit": "ms", "traceEvents": [')
        for count, event in enumerate(trace_events(folder), start=1):
            file.write(((",\n" if count > 1 else "\n") + json.dumps(event, allow_nan=False)).encode())
        file.write(b"\n]}\n")
    if count:
        write_whole(folder / TRACE_FILE, packed.getvalue())


def trace_events(folder: Path) -> Iterator[Event]:
    """Events of all ranks whose spans are in `folder`."""
    for rank, (name, path) in enumerate(rank_files(folder)):
        steps = read_spans(path, EVERY_STEP)
        if steps:
            yield _named("process_name", rank, MAIN, name)
            yield _named("thread_name", rank, MAIN, "main thread")
        begin_s, threads, numbers = 0.0, dict[int, int](), itertools.count(1)
        for step in steps.values():
            yield from _nested(step, rank, begin_s)
            yield from _beside(step, rank, begin_s, threads, numbers)
            for at_s, values in step.samples:
                for key in COUNTERS:
                    if key in values:
                        yield _event("C", key, rank, MAIN, begin_s + at_s, args={key: values[key]})
            begin_s += step.spans[0].host_s


def _nested(step: StepSpans, rank: int, begin_s: float) -> Iterator[Event]:
    """The main thread's spans. Stored times are rounded, so each is cut where its parent ends or a sibling does."""
    classes, bounds = classify(step.spans), list[tuple[float, float]]()
    free_s = [span.start_s for span in step.spans]  # of each span, where its next child may begin
    for span, (stage, part) in zip(step.spans, classes, strict=True):
        start_s, end_s = span.start_s, span.start_s + span.host_s
        if span.parent >= 0:
            end_s = min(end_s, bounds[span.parent][1])
            start_s = min(max(start_s, free_s[span.parent]), end_s)
            free_s[span.parent] = end_s = max(start_s, end_s)
        bounds.append((start_s, end_s))
        free_s[span.index] = start_s
        args = {"step": step.step, "part": part or span.part}
        name = stage if span.parent >= 0 else f"step {step.step}"
        yield _event("X", name, rank, MAIN, begin_s + start_s, cat=stage, dur=_us(end_s - start_s), args=args)


def _beside(
    step: StepSpans, rank: int, begin_s: float, threads: dict[int, int], numbers: Iterator[int]
) -> Iterator[Event]:
    """Spans of other threads and of coroutines, which may overlap; `threads` gets a number for each."""
    for span in step.others:
        if span.thread not in threads:
            threads[span.thread] = MAIN + 1 + len(threads)
            yield _named("thread_name", rank, threads[span.thread], f"thread {threads[span.thread]}")
        more = {"cat": span.stage or "other", "id": f"{rank}.{next(numbers)}"}
        for phase, at_s in (("b", span.start_s), ("e", span.start_s + span.host_s)):
            args = {"step": step.step, "part": span.part}
            yield _event(phase, span.stage or "other", rank, threads[span.thread], begin_s + at_s, **more, args=args)


def _named(kind: str, rank: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": rank, "tid": track, "args": {"name": name}}


def _event(phase: str, name: str, rank: int, track: int, at_s: float, **more: Any) -> Event:
    return {"ph": phase, "name": name, "pid": rank, "tid": track, "ts": _us(at_s), **more}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
