"""Output for people: reports on standard output, progress on standard error, both from the first rank alone."""

from __future__ import annotations

import codecs
import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Self, TextIO

from grpo_autotune.errors import LONGEST, AutotuneError, printable, shortened
from grpo_autotune.units import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

HEARTBEAT_S = 5.0
"""Seconds between two looks at what is under way."""

REPEAT_S = 15.0
"""Seconds after which the same thing is said again."""

SIGNS = {"±": "+-", "µ": "u", "█": "#", "─": "-", "━": "-", "│": "|", "╸": "-", "╺": "-", "•": "*", "…": "..."}
SIGNS |= dict(zip("▁▂▃▄▅▆▇", "_.-=+*%", strict=True))
"""Signs of our own output and of rich's -> what stands for each where the terminal's encoding has no such sign."""


def accept_any_text() -> None:
    """Let standard output and error take every character: one that their encoding has not is written otherwise."""
    codecs.register_error("grpo-autotune", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="grpo-autotune")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def is_first_rank() -> bool:
    """Return whether this process is rank 0 under `torchrun`, or runs alone."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line of progress."""
    if is_first_rank():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def warn(sentence: str) -> None:
    """Print something that the user should not miss."""
    say(f"warning: {sentence}")


def complain(line: str, *, everywhere: bool) -> None:
    """Print why a command failed: on the first rank, and if `everywhere` on each, since another rank may fail alone."""
    if is_first_rank():
        say(line)
    elif everywhere:
        sys.stderr.write(f"rank {os.environ['RANK']}: {line}\n")
        sys.stderr.flush()


@contextmanager
def as_warning(what: str) -> Iterator[None]:
    """Make a warning of any failure inside: for work of ours beside a training that must not suffer from it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the one boundary: what was trained counts more than what was measured
        kind = "" if isinstance(error, AutotuneError) else f"{type(error).__name__}: "
        warn(shortened(printable(f"{what}: {kind}{error}"), LONGEST))


def show(text: str) -> None:
    """Print a result."""
    if is_first_rank():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


@contextmanager
def output_aside() -> Iterator[None]:
    """Lead standard output to standard error meanwhile, that of other libraries and of child processes included."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class Heartbeat:
    """A line now and then about what is under way, from a daemon thread, while its context is open; what was said
    already is said again only after `REPEAT_S`."""

    def __init__(
        self,
        describe: Callable[[], str | None],  # what is under way, as "what, how long"; None for nothing worth a line
        tell: Callable[[str], None] = say,
        every_s: float = HEARTBEAT_S,  # between looks
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._describe, self._tell, self._every_s, self._clock = describe, tell, every_s, clock
        self._said, self._said_at = "", 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grpo-autotune-heartbeat", daemon=True)

    def beat(self) -> None:
        line = self._describe()
        if line is None:
            return
        what, now = line.rpartition(",")[0], self._clock()
        if what != self._said or now - self._said_at >= REPEAT_S:
            self._said, self._said_at = what, now
            self._tell(line)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.beat()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def is_live(stream: TextIO | None = None) -> bool:
    """Return whether `stream`, or standard error, is a terminal that rewrites lines; a notebook's cell is none."""
    return (stream or sys.stderr).isatty() and "JPY_PARENT_PID" not in os.environ


def progress_console() -> Console:
    """A rich console for progress on standard error."""
    from rich.console import Console

    return Console(stderr=True, force_jupyter=False, force_terminal=None if is_live() else False)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Progress on the first rank, of `total` steps: on a terminal (of standard error by default) a bar between a title
    and a text, plain lines elsewhere."""

    def __init__(
        self, title: str, total: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total, self._clock, self._begun_s, self._said_s = total, clock, clock(), -math.inf
        self._console = console or progress_console()
        self._bar: Progress | None = None
        if self._console.is_terminal and is_first_rank():
            columns = (TextColumn(title), BarColumn(bar_width=24), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[beside]}"), console=self._console)
            self._task = self._bar.add_task("", total=total, beside="")
            self._bar.start()

    def update(self, done: int, beside: str, line: str | None, every_s: float = 0.0) -> None:
        """Move the bar to `done` steps, with `beside` next to it; without a terminal print `line`, if there is one, of
        the last step or `every_s` seconds after the line before."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, beside=beside)
        elif line is not None and is_first_rank():
            now_s = self._clock()
            if now_s - self._said_s >= every_s or done == self._total:
                self._said_s = now_s
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def time_left(self, done: int) -> str:
        """The time until the end in words, if the rest goes as the first `done` steps went."""
        return f"about {duration((self._clock() - self._begun_s) / done * (self._total - done))} left"

    def tick(self, done: int, what: str, every_s: float = 0.0) -> None:
        """Move the bar to `done` steps; lines tell `what`, and the time that is left."""
        left = self.time_left(done)
        self.update(done, left, f"{what}, {left}", every_s)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __exit__(self, *exc: object) -> None:
        self.close()
