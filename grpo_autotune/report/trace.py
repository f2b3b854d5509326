"""`trace.json.gz`: the spans of a run in the Chrome trace format, as ui.perfetto.dev and speedscope open them.

A process for each rank, a track for its main thread with nested slices, async slices for other threads' work, which
overlaps, and counters of memory and use. Times are the host's, steps stand end to end. A slice's category is its stage:
less what is nested in them, the slices of a category last as long as the report says (`mean_s`, or `host_s` on a GPU).
"""

from __future__ import annotations

import gzip
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
    events = [json.dumps(event, allow_nan=False) for event in trace_events(folder)]
    if events:
        text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(events) + "\n]}\n"
        write_whole(folder / TRACE_FILE, gzip.compress(text.encode(), mtime=0))


def trace_events(folder: Path) -> Iterator[Event]:
    """Events of all ranks whose spans are in `folder`."""
    for rank, (name, path) in enumerate(rank_files(folder)):
        begin_s, numbers = 0.0, itertools.count()
        for step in read_spans(path, EVERY_STEP).values():
            if not begin_s:
                yield _event("M", "process_name", rank, 0.0, args={"name": name})
                yield _event("M", "thread_name", rank, 0.0, args={"name": "main thread"})
            yield from _nested(step, rank, begin_s)
            for span, (phase, share) in itertools.product(step.others, (("b", 0), ("e", 1))):
                at_s, stage = begin_s + span.start_s + share * span.host_s, span.stage or "other"
                more = {"id": f"{rank}.{next(numbers) // 2}", "args": {"step": step.step, "part": span.part}}
                yield _event(phase, stage, rank, at_s, cat=stage, tid=span.thread, **more)
            for (at_s, values), key in itertools.product(step.samples, COUNTERS):
                if key in values:
                    yield _event("C", key, rank, begin_s + at_s, args={key: values[key]})
            begin_s += step.spans[0].host_s


def _nested(step: StepSpans, rank: int, begin_s: float) -> Iterator[Event]:
    """The main thread's spans. Stored times are rounded, so each is cut where its parent ends or a sibling does."""
    ends_s = [0.0] * len(step.spans)
    free_s = list(ends_s)  # of each span, where its next child may begin
    for span, (stage, part) in zip(step.spans, classify(step.spans), strict=True):
        start_s, end_s = span.start_s, span.start_s + span.host_s
        if span.parent >= 0:
            end_s = min(end_s, ends_s[span.parent])
            start_s = min(max(start_s, free_s[span.parent]), ends_s[span.parent])
            free_s[span.parent] = end_s = max(start_s, end_s)
        ends_s[span.index], free_s[span.index] = end_s, start_s
        more: Event = {
            "cat": stage,
            "dur": round((end_s - start_s) * 1e6, 3),
            "args": {"step": step.step, "part": part},
        }
        yield _event("X", stage if span.parent >= 0 else f"step {step.step}", rank, begin_s + start_s, **more)


def _event(phase: str, name: str, rank: int, at_s: float, *, tid: int = MAIN, **more: Any) -> Event:
    return {"ph": phase, "name": name, "pid": rank, "tid": tid, "ts": round(at_s * 1e6, 3), **more}
