"""A timed tree: spans opened and closed on the main thread nest, spans of other threads are kept beside them.

The clock, the device's timer and the memory gauge are arguments, so that the tree can be tested without a GPU and
without sleeping. One tree (`StepSpans`) covers one optimizer step.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

BRIEF, GAP_S = "prompt", 5e-5
"""The stage of the host's work that comes in many short calls, and the gap up to which a call goes on with the span of
the one before it: each row's chat template is one."""


class DeviceTimer(Protocol):
    """Marks moments on the accelerator's stream without waiting for it; a mark is done once the stream has passed it,
    and seconds are those between two such."""

    def mark(self) -> Any: ...
    def done(self, mark: Any) -> bool: ...
    def wait(self, mark: Any) -> None: ...
    def seconds(self, begin: Any, end: Any) -> float: ...


@dataclass(slots=True)
class Span:
    """One stretch of time; `start_s` is on the recorder's clock, `parent` an index into the step's spans (-1: root)."""

    stage: str
    part: str
    parent: int
    index: int
    start_s: float
    host_s: float = 0.0
    thread: int = 0
    calls: int = 1
    peak_bytes: int = 0
    has_range: bool = False
    begin_mark: Any = None
    end_mark: Any = None


@dataclass(slots=True)
class StepSpans:
    """The spans of one optimizer step; `spans[0]` is the step itself."""

    step: int
    spans: list[Span]
    others: list[Span] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # time, and what was read by name

    def line(self) -> dict[str, Any]:
        """The step as a line of `spans.jsonl`: spans as [stage, part, parent, start, seconds], with the thread for the
        parent on other threads, samples as [time, values]; ends are rounded too, so that what nests still does."""

        def row(span: Span, third: int) -> list[Any]:
            begin, end = at(span.start_s), at(span.start_s + span.host_s)
            return [span.stage, span.part, third, begin, round(end - begin, 6)]

        def at(time_s: float) -> float:
            return round(time_s - self.spans[0].start_s, 6)

        spans, others = [row(s, s.parent) for s in self.spans], [row(s, s.thread) for s in self.others]
        samples = [[at(time_s), values] for time_s, values in self.samples]
        return {"step": self.step, "spans": spans, "other_threads": others, "samples": samples}


class SpanRecorder:
    """Records spans while a root is open, and costs a comparison while none is."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        timer: DeviceTimer | None = None,  # the accelerator's; None on CPU
        memory: Callable[[], int] | None = None,  # bytes in use, or the peak since the last call where that can be told
        ranges: Any = None,  # `torch.cuda.nvtx`, which gets a range around each span of the main thread
    ) -> None:
        self.clock, self.timer, self.memory, self.ranges = clock, timer, memory, ranges
        self.edge: Callable[[], None] | None = None  # called at every begin and end, on whichever thread it happens
        self._spans: list[Span] = []
        self._stack: list[Span] = []
        self._others: list[Span] = []
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._thread = 0

    @property
    def is_open(self) -> bool:
        """True while an optimizer step is under way."""
        return bool(self._stack)

    def current(self) -> Span | None:
        """The innermost open span of the main thread; safe to call from any thread."""
        stack = self._stack[-1:]  # of its own: the main thread may empty the other one meanwhile
        return stack[0] if stack else None

    def age_s(self) -> float:
        """Seconds since the step under way began, 0 without one; safe to call from any thread."""
        stack = self._stack[:1]
        return self.clock() - stack[0].start_s if stack else 0.0

    def mark(self) -> tuple[int, int, int]:
        """A value that every edge of a span within this step changes; safe to call from any thread."""
        newest = self._spans[-1:]
        return len(self._spans), len(self._stack), newest[0].calls if newest else 0

    def inside(self, stage: str, part: str | None = None) -> bool:
        """Return whether a span of `stage` (and `part`) is open on the main thread."""
        for span in self._stack:  # noqa: SIM110 - a generator takes twice as long, and each row's prompt asks
            if span.stage == stage and (part is None or span.part == part):
                return True
        return False

    def open_root(self) -> None:
        """Begin an optimizer step on this thread; what was open and never closed is dropped."""
        self.abandon()
        self._thread = threading.get_ident()
        self.begin("", "step")

    def close_root(self, step: int) -> StepSpans:
        self.end(self._stack[0])
        done = StepSpans(step, self._spans, self._others, self._samples)
        self._spans, self._others, self._samples = [], [], []
        return done

    def abandon(self) -> None:
        while self._stack:
            self._pop()
        self._spans, self._others, self._samples = [], [], []

    def enter(self, stage: str, part: str = "") -> Span | None:
        """Open a span for `leave`; None on another thread, and while no step is under way."""
        return self.begin(stage, part) if self._stack and threading.get_ident() == self._thread else None

    def leave(self, span: Span | None) -> None:
        """Close what `enter` opened, unless the step was left meanwhile."""
        if span is not None and self._stack:
            self.end(span)

    def begin(self, stage: str, part: str = "") -> Span:
        """Open a span under the innermost open one, or go on with the last."""
        spans, inner = self._spans, self._stack[-1] if self._stack else None
        self._gauge(inner, stage)
        now, parent = self.clock(), -1 if inner is None else inner.index
        if stage == BRIEF and spans and _goes_on(spans[-1], stage, part, parent, now):
            span = spans[-1]
            span.calls += 1
        else:
            span = Span(stage, part, parent, len(spans), now)
            spans.append(span)
            if self.timer is not None:
                span.begin_mark = self.timer.mark()
        self._stack.append(span)
        if self.ranges is not None and self.on_main_thread():  # each thread has its own stack of ranges
            self.ranges.range_push(": ".join(word for word in (stage, part) if word))
            span.has_range = True
        if self.edge is not None:
            self.edge()
        return span

    def end(self, span: Span) -> None:
        """Close `span` and whatever an exception left open inside it."""
        self._gauge(
            self._stack[-1] if self._stack else None, self._spans[span.parent].stage if span.parent >= 0 else None
        )
        now = self.clock()
        mark = self.timer.mark() if self.timer is not None else None
        while self._stack:
            inner = self._pop()
            inner.host_s = now - inner.start_s
            inner.end_mark = mark
            if inner is span:
                break
        if self.edge is not None:
            self.edge()

    @contextmanager
    def span(self, stage: str, part: str = "") -> Iterator[None]:
        """A context around `enter` and `leave`."""
        span = self.enter(stage, part)
        try:
            yield
        finally:
            self.leave(span)

    def begin_elsewhere(self, stage: str, part: str) -> Span:
        """Open a span of another thread, or of a coroutine on the main one; it nests in nothing."""
        return Span(stage, part, -1, -1, self.clock(), thread=threading.get_ident())

    def end_elsewhere(self, span: Span) -> None:
        span.host_s = self.clock() - span.start_s
        self._others.append(span)
        if self.edge is not None:
            self.edge()

    def note(self, values: dict[str, float]) -> None:
        """Keep a sample of the machine with the step under way; safe to call from any thread."""
        if self._stack:
            self._samples.append((self.clock(), values))

    def on_main_thread(self) -> bool:
        """Return whether the caller is the thread that runs the optimizer step."""
        return threading.get_ident() == self._thread

    def _pop(self) -> Span:
        span = self._stack.pop()
        if span.has_range and self.on_main_thread():
            self.ranges.range_pop()
        return span

    def _gauge(self, inner: Span | None, stage: str | None) -> None:
        """Book the memory to the span under way, `inner`, before another `stage` goes on."""
        if self.memory is None or (inner is not None and inner.stage == stage):
            return
        used = self.memory()
        if inner is not None and used > inner.peak_bytes:
            inner.peak_bytes = used


def _goes_on(last: Span, stage: str, part: str, parent: int, now: float) -> bool:
    same = last.part == part and last.stage == stage and last.parent == parent
    return same and now - last.start_s - last.host_s < GAP_S
