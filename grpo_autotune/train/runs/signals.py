"""Ctrl-C and the signals of `stop_signals` ask for a stop; the trainer honours it after the step, with a checkpoint.

Only the request is kept here. The trainer makes it collective: a signal may reach one rank and not the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from grpo_autotune.processes.ending import ENDING

REPEAT_S, FORWARD_S = 0.5, 10.0
"""Seconds within which two of a kind are one wish, Ctrl-C or another: a launcher forwards what a terminal, or Slurm,
has sent to all processes already."""


class StopRequest:
    """While entered, turns the first of these signals, or Ctrl-C, into a wish to stop. The same one again, or Ctrl-C
    behind another, is only told, and ends the process at once when it comes once more, as a second Ctrl-C does: Slurm
    repeats SIGTERM at the end of a grace time, and sends it behind the signal that it gave ahead of a limit.

    `say` tells the user, from inside a signal handler: it must not print through a buffered stream. `die` ends the
    process by a signal whose default action was put back.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = ENDING,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        die: Callable[[int], None] | None = None,
    ) -> None:
        self.signum = 0  # the signal that came
        self.agreed = 0  # the one that some rank has received, as all ranks know since the last step
        self._say, self._clock, self._die = say or _write_line, clock, die or _die_by
        self._signals, self._pid = (signal.SIGINT, *signals), os.getpid()
        self._at_s, self._is_repeated = 0.0, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader worker inherits the handler; its parent decides
            return
        now = self._clock()
        if self.signum == 0:
            self.signum, self._at_s = signum, now
            self._say(
                f"{signal.Signals(signum).name}: stopping after this step, evaluation or save, with a checkpoint "
                f"(Ctrl-C {'again' if signum == signal.SIGINT else 'twice'} ends at once, without saving)"
            )
        elif signum in (signal.SIGINT, self.signum) and now - self._at_s > (
            REPEAT_S if signum == signal.SIGINT else FORWARD_S
        ):
            if self._is_repeated or signum == self.signum == signal.SIGINT:
                self._say("stopped at once: this step was not saved")
                self._die(signum)
            else:
                self._is_repeated, self._at_s = True, now
                self._say(f"{signal.Signals(signum).name}: still stopping (once more ends at once, without saving)")


def exit_code(signum: int) -> int:
    """The shell's convention for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM; 0 for none."""
    return 128 + signum if signum else 0


def _write_line(line: str) -> None:
    os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


def _die_by(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(exit_code(signum))  # the first process of a container has no default action
