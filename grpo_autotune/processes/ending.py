"""Signals that end a command: SIGTERM, and the two that schedulers are asked to send ahead of a time limit."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

GRACE_S = 30.0
"""What a command has to end after a signal; one that comes later counts again: a bare `except` may have eaten it."""


class Stopped(KeyboardInterrupt):
    """One of them came: whoever ends well by a Ctrl-C does so by this."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def signal_of(error: KeyboardInterrupt) -> tuple[int, str]:
    """The signal that an interruption stands for, and its name for people."""
    signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
    return signum, "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


@contextmanager
def raising(end: Callable[[int], BaseException] = Stopped, more: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """Raise `end(signum)` at a signal of `ENDING` and `more`, or end a forked child; ignore others for `GRACE_S`."""
    parent, signals, last = os.getpid(), (*ENDING, *more), -math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != parent:
            os._exit(128 + signum)
        if (now := time.monotonic()) - last > GRACE_S:
            last = now
            raise end(signum)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
