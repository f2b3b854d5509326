"""The timed tree and its stages, on a clock that the test turns."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.probe.spans import GAP_S, SpanRecorder
from grpo_autotune.probe.stages import FIRST_USE, stages_of, summarise
from grpo_autotune.records.probe import STAGES
from grpo_autotune.seams.first_use import first_use, watch_first_use


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_a_stage_holds_self_time_and_stages_sum_to_the_step():
    clock = Clock()
    recorder = SpanRecorder(clock)
    recorder.open_root()
    clock.wait(0.5)
    with recorder.span("generation", "generate"):
        clock.wait(2)
        with recorder.span("weight_sync"):
            clock.wait(1)
        clock.wait(1)
    with recorder.span("", "score"):
        clock.wait(0.25)
    step = stages_of(recorder.close_root(1))
    assert step.self_s == {"other": 0.75, "generation": 3.0, "weight_sync": 1.0}
    assert step.parts["generation", "generate"] == 3.0
    assert step.wall_s == 4.75


def test_evaluation_counts_apart_with_its_parts():
    clock = Clock()
    recorder = SpanRecorder(clock)
    recorder.open_root()
    with recorder.span("log_save_eval", "log"):
        clock.wait(1)
        with recorder.span("log_save_eval", "evaluate"):
            with recorder.span("generation", "generate"):
                clock.wait(5)
            with recorder.span("log_save_eval", "log"):
                clock.wait(1)
        with recorder.span("log_save_eval", "save"):
            clock.wait(2)
    step = stages_of(recorder.close_root(1))
    assert step.self_s["log_save_eval"] == 9 and "generation" not in step.self_s
    parts = {part: seconds for (_, part), seconds in step.parts.items()}
    assert parts["evaluate"] == 6 and parts["save"] == 2 and parts["log"] == 1


def test_an_exception_closes_what_it_leaves_open():
    clock = Clock()
    recorder = SpanRecorder(clock)
    recorder.open_root()
    with pytest.raises(ValueError), recorder.span("reward"):
        recorder.begin("sync_wait")
        clock.wait(1)
        raise ValueError
    clock.wait(1)
    step = stages_of(recorder.close_root(1))
    assert step.self_s["sync_wait"] == 1 and step.self_s["other"] == 1


def test_other_threads_do_not_disturb_the_tree_and_hidden_is_what_nobody_waited_for():
    clock = Clock()
    recorder = SpanRecorder(clock)
    recorder.open_root()
    judged = recorder.begin_elsewhere("reward", "judge")
    with recorder.span("reference_logprob"):
        clock.wait(3)
    with recorder.span("reward"):
        clock.wait(1)
        recorder.end_elsewhere(judged)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(recorder.span("reward").__enter__()))
    thread.start()
    thread.join()
    step = stages_of(recorder.close_root(1))
    assert step.hidden_s == {"reward": 3.0}
    assert step.self_s["reward"] == 1.0


def test_nothing_is_recorded_while_no_step_is_under_way():
    recorder = SpanRecorder(Clock())
    with recorder.span("generation"):
        assert recorder.current() is None


def test_a_step_may_end_while_another_thread_asks_for_its_age():
    def ends() -> float:
        recorder.abandon()
        return 1.0

    recorder = SpanRecorder(ends)
    recorder.open_root()
    assert recorder.age_s() == 0.0 and not recorder.is_open


class Ranges:
    """NVTX as far as its stacks go, one for each thread."""

    def __init__(self) -> None:
        self.open: dict[int, list[str]] = {}

    def range_push(self, name: str) -> None:
        self.open.setdefault(threading.get_ident(), []).append(name)

    def range_pop(self) -> None:
        self.open[threading.get_ident()].pop()


def test_a_span_that_another_thread_opened_leaves_each_thread_its_own_ranges():
    """Where DDP has all gradients, on a GPU, autograd's thread opens the wait that ends with the backward pass."""
    recorder = SpanRecorder(Clock(), ranges=(ranges := Ranges()))
    recorder.open_root()
    with recorder.span("backward"):
        thread = threading.Thread(target=lambda: recorder.begin("sync_wait", "reduce_gradients"))
        thread.start()
        thread.join()
    assert ranges.open == {threading.get_ident(): ["step"]}
    recorder.close_root(1)
    assert ranges.open == {threading.get_ident(): []}


class FakeTimer:
    """A stream that runs behind the host: each mark is passed `lag` seconds after it was recorded."""

    def __init__(self, clock: Clock, lag: float) -> None:
        self.clock, self.lag = clock, lag

    def mark(self) -> float:
        return self.clock.now + self.lag

    def done(self, mark: float) -> bool:
        return self.clock.now >= mark

    def wait(self, mark: float) -> None:
        self.clock.now = max(self.clock.now, mark)

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def test_with_a_device_timer_both_times_are_kept():
    clock = Clock()
    timer = FakeTimer(clock, 0.0)
    recorder = SpanRecorder(clock, timer)
    recorder.open_root()
    with recorder.span("backward"):
        clock.wait(1)
        timer.lag = 4.0
    spans = recorder.close_root(1)
    step = stages_of(spans, timer)
    assert step.host_s["backward"] == 1.0
    assert step.self_s["backward"] == 5.0
    assert step.wall_s == pytest.approx(5.0)


spans = st.recursive(
    st.tuples(st.sampled_from([*STAGES[:-1], ""]), st.floats(0, 10)),
    lambda inner: st.tuples(st.sampled_from([*STAGES[:-1], ""]), st.floats(0, 10), st.lists(inner, max_size=4)),
    max_leaves=20,
)


@given(st.lists(spans, max_size=6))
def test_stages_always_sum_to_the_step(tree: list):
    clock = Clock()
    recorder = SpanRecorder(clock)

    def play(node: tuple) -> None:
        with recorder.span(node[0]):
            clock.wait(node[1])
            for child in node[2] if len(node) > 2 else []:
                play(child)

    recorder.open_root()
    for node in tree:
        play(node)
    step = stages_of(recorder.close_root(1))
    assert sum(step.self_s.values()) == pytest.approx(clock.now, abs=1e-9)
    timings = summarise([step], warmup=1, cycle=1, on_device=False, seams={})
    assert [row.name for row in timings.stages] == list(STAGES)
    assert sum(row.per_step_s[0] for row in timings.stages) == pytest.approx(timings.step_s[0], abs=1e-9)


@pytest.mark.parametrize("timed", [False, True])
def test_short_calls_of_a_prompt_are_one_span_and_every_edge_of_them_is_seen(timed: bool) -> None:
    clock = Clock()
    recorder = SpanRecorder(clock, FakeTimer(clock, 0.0) if timed else None)
    marks: list[object] = []
    recorder.edge = lambda: marks.append(recorder.mark())
    recorder.open_root()
    for part, gap_s in (("template", 0.0), ("template", GAP_S / 2), ("template", 2 * GAP_S), ("processor", 0.0)):
        clock.wait(gap_s)
        with recorder.span("prompt", part):
            clock.wait(1)
    for _ in range(2):
        with recorder.span("reward", "judge"):
            clock.wait(1)
    spans = recorder.close_root(1)
    assert [(span.part, span.calls) for span in spans.spans[1:]] == [
        ("template", 2), ("template", 1), ("processor", 1), ("judge", 1), ("judge", 1),
    ]  # fmt: skip
    step = stages_of(spans, recorder.timer)
    assert step.calls["prompt"] == 4 and step.parts["prompt", "template"] == pytest.approx(3 + GAP_S / 2)
    assert sum(step.self_s.values()) == pytest.approx(clock.now)
    assert all(before != after for before, after in itertools.pairwise(marks))


def test_the_gauge_is_booked_to_the_stage_that_was_under_way():
    readings = iter([10, 10, 70, 20, 20])
    recorder = SpanRecorder(Clock(), memory=lambda: next(readings))
    recorder.open_root()
    span = recorder.begin("backward")
    recorder.end(span)
    peaks = stages_of(recorder.close_root(1)).peak_bytes
    assert peaks == {"other": 20, "backward": 70}


def test_what_is_done_once_in_a_run_is_no_part_of_the_step_it_falls_into():
    clock = Clock()
    recorder = SpanRecorder(clock)
    leave = watch_first_use(functools.partial(recorder.span, "", FIRST_USE))
    recorder.open_root()
    with recorder.span("policy_logprob", "training_forward"):
        clock.wait(1)
        with first_use():
            clock.wait(4)
            with recorder.span("policy_logprob", "training_forward"):
                clock.wait(2)
        clock.wait(1)
    done = recorder.close_root(1)
    step, whole = stages_of(done), stages_of(done, whole=True)
    assert step.self_s == {"other": 0.0, "policy_logprob": 2.0} and step.wall_s == 2.0
    assert step.parts["policy_logprob", "training_forward"] == 2.0 and step.calls["policy_logprob"] == 1
    assert whole.wall_s == 8.0 and whole.parts["other", FIRST_USE] == 6.0
    leave()
    leave()
    recorder.open_root()
    with first_use():
        clock.wait(3)
    assert stages_of(recorder.close_root(2)).wall_s == 3.0, "nobody watches"
