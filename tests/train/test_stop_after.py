"""When a run stops that is only a measurement."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from grpo_autotune.train.runs.callbacks import Enough, StopAfter


@pytest.mark.parametrize(
    ("enough", "steps"),
    [(None, 6), (Enough(2, 1, 1e9), 6), (Enough(2, 1, 0.0), 2), (Enough(3, 2, 0.0), 3)],
)
def test_a_run_stops_after_its_steps_or_when_it_is_enough(enough: Enough | None, steps: int) -> None:
    told: list[int] = []
    stop, control = StopAfter(6, told.append, enough), SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(global_step=10)
    stop.on_train_begin(None, state, control)
    while not control.should_training_stop:
        state.global_step += 1
        stop.on_step_end(None, state, control)
    assert told == list(range(1, steps + 1))


def test_a_late_stop_waits_for_the_end_of_a_cycle() -> None:
    stop, control = StopAfter(9, enough=Enough(3, 2, 0.0)), SimpleNamespace(should_training_stop=False)
    stop.on_train_begin(None, SimpleNamespace(global_step=0), control)
    stop.on_step_end(None, SimpleNamespace(global_step=4), control)
    assert not control.should_training_stop
    stop.on_step_end(None, SimpleNamespace(global_step=5), control)
    assert control.should_training_stop
