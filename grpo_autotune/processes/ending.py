"""Signals that end a command: SIGTERM, and the two that schedulers are asked to send ahead of a time limit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(KeyboardInterrupt):
    """One of them came: whoever ends well by a Ctrl-C does so by this."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def raising(end: Callable[[int], BaseException] = Stopped, more: Sequence[signal.Signals] = ()) -> Iterator[None]:
    """Raise `end(signum)` at the first of `ENDING` and `more`, or end a forked child, and ignore later ones."""
    parent, signals = os.getpid(), (*ENDING, *more)

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:
            os._exit(128 + signum)
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise end(signum)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
