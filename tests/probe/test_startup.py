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
        now[0] = 125.0
        assert startup.now() == "start-up: import, 2 min 05 s"


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
