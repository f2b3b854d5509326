"""`trace.json.gz`: the spans of a run in the Chrome trace format, as ui.perfetto.dev and speedscope open them.

A process for each rank, a track for its main thread with nested slices, async slices for other threads' work, which
overlaps, and counters of memory and use. Times are the host's, steps stand end to end. A slice's category is its stage:
less what is nested in them, the slices of a category last as long as the report says (`mean_s`, or `host_s` on a GPU).
Those of `first_use` are no stage's: a speed-up's one comparison with plain TRL.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_autotune.console import as_warning
from grpo_autotune.files import write_whole
from grpo_autotune.probe.spans import StepSpans
from grpo_autotune.probe.stages import ONCE, classify
from grpo_autotune.report.timeline import rank_files, read_spans

TRACE_FILE = "trace.json.gz"


@as_warning("no trace")
def keep_trace(folder: Path) -> None:
    """Write the trace of the spans in `folder`, beside what was measured and saved already; nothing without spans."""
    events = [json.dumps(event, allow_nan=False) for event in trace_events(folder)]
    if events:
        text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(events) + "\n]}\n"
        write_whole(folder / TRACE_FILE, gzip.compress(text.encode(), mtime=0))


def trace_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of all ranks whose spans are in `folder`; the main thread is number 1 of its rank."""
    for rank, (name, path) in enumerate(rank_files(folder)):
        begin_us, steps = 0, read_spans(path, range(10**18)).values()
        for kind, title in (("process_name", name), ("thread_name", "main thread")) if steps else ():
            yield {"ph": "M", "name": kind, "pid": rank, "tid": 1, "ts": 0, "args": {"name": title}}
        for step in steps:
            for at_s, event in _events(step):
                yield {"pid": rank, "tid": 1, "ts": begin_us + round(at_s * 1e6), **event}
            begin_us += round(step.spans[0].host_s * 1e6)


def _events(step: StepSpans) -> Iterator[tuple[float, dict[str, Any]]]:
    """Seconds since the step began, and what else an event has."""
    for span, (stage, part) in zip(step.spans, classify(step.spans), strict=True):
        name, length_us = stage if span.parent >= 0 else f"step {step.step}", round(span.host_s * 1e6)
        category = part if (stage, part) == ONCE else stage
        yield span.start_s, {"ph": "X", "name": name, "cat": category, "dur": length_us, "args": {"part": part}}
    for number, span in enumerate(step.others):
        name, key, more = span.stage or "other", {"local": f"{step.step}.{number}"}, {"part": span.part}
        for phase, at_s in (("b", span.start_s), ("e", span.start_s + span.host_s)):
            yield at_s, {"ph": phase, "name": name, "cat": name, "id2": key, "tid": span.thread, "args": more}
    for at_s, values in step.samples:
        yield from ((at_s, {"ph": "C", "name": key, "args": {key: value}}) for key, value in values.items())
