"""Signals that end a command: the first counts, and the exit code tells which."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from grpo_autotune.cli import main as cli
from grpo_autotune.processes.ending import ENDING, GRACE_S, Stopped, raising


@pytest.mark.parametrize("signum", ENDING)
def test_a_command_that_a_signal_ends_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    before = signal.getsignal(signum)
    monkeypatch.setattr(cli, "app", lambda *words, **keys: lambda: signal.raise_signal(signum))
    assert cli.main(["train"]) == 128 + signum
    assert capsys.readouterr().err == f"grpo-autotune: stopped by {signum.name}\n"
    assert signal.getsignal(signum) is before


def test_what_is_wound_up_is_not_ended_by_a_second_signal() -> None:
    with raising():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.signum == signal.SIGUSR1


def test_a_signal_that_somebody_caught_counts_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare `except` around a reward is common; what a scheduler sends later must still end the command."""
    with pytest.raises(Stopped), raising():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + GRACE_S + 1.0
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGTERM)
