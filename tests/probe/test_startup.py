"""Seconds of start-up by phase, under a clock that the test drives."""

from __future__ import annotations

import gc

import pytest

from grpo_autotune.probe.startup import Startup


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    now = [100.0]
    startup = Startup(lambda: now[0], born_s=90.0)
    with startup.phase("trainer"):
        now[0] = 101.0
        with startup.phase("model"):
            now[0] = 104.0
        now[0] = 104.5
    startup.since_birth("import")
    assert {phase.name: phase.seconds for phase in startup.phases()} == pytest.approx(
        {"model": 3.0, "trainer": 1.5, "import": 10.0}
    )


def test_a_phase_is_told_once_it_takes_time() -> None:
    now = [0.0]
    startup = Startup(lambda: now[0], born_s=0.0)
    assert startup.now() is None
    with startup.phase("import"):
        assert startup.now() is None, "`0 s` tells nothing"
        now[0] = 42.0
        assert startup.now() == "start-up: import, 42 s"


def test_imports_are_counted_from_birth_and_out_of_the_collectors_sight() -> None:
    gc.unfreeze()
    now = [103.0]
    startup = Startup(lambda: now[0], born_s=100.0)
    with startup.imports():
        assert not gc.isenabled()
        now[0] = 105.0
    assert gc.isenabled() and (kept := gc.get_freeze_count())
    with startup.imports():
        pass
    assert gc.get_freeze_count() <= kept, "a second trial of this process may leave garbage"
    assert {phase.name: phase.seconds for phase in startup.phases()} == {"import": 5.0}


def test_a_phase_that_may_hang_is_told_with_what_to_look_at() -> None:
    now = [0.0]
    startup = Startup(lambda: now[0], born_s=0.0)
    with startup.phase("model"):
        now[0] = 59.0
        assert startup.now() == "start-up: model, 59 s"
        now[0] = 61.0
        assert startup.now() == "start-up: model (look at: a download, a slow disk), 1 min 01 s"
    with startup.phase("my_judge"):
        now[0] = 200.0
        assert "my_judge (look at: its endpoint, which has not answered" in (startup.now() or "")


def test_the_first_step_is_told_by_generation_rewards_and_rest() -> None:
    startup = Startup(lambda: 0.0, born_s=0.0)
    startup.first_step({"other": 0.5, "generation": 2.0, "backward": 1.0, "reward": 3.0})
    phases = [(phase.name, phase.seconds) for phase in startup.phases()]
    assert phases == [("first_generation", 2.0), ("first_reward", 3.0), ("first_update", 1.5)]
