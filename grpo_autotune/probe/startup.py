"""Start-up by phase, and a heartbeat line that says what is under way, so that nobody stares at `0%`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from grpo_autotune.records.probe import Phase
from grpo_autotune.units import duration

HEARTBEAT_S = 5.0
REPEAT_S = 15.0


class Startup:
    """Seconds of each phase before the first step; a phase inside another takes its seconds out of the outer one.

    Args:
        clock: Seconds since the epoch, as the operating system gives the process's birth.
        born_s: When this process began, on the same clock.
    """

    def __init__(self, clock: Callable[[], float] = time.time, born_s: float | None = None) -> None:
        self._clock = clock
        self.born_s = psutil.Process().create_time() if born_s is None else born_s
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside to `name`."""
        begin = self._clock()
        self._open.append((name, begin))
        try:
            yield
        finally:
            self._open.pop()
            self.add(name, self._clock() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Book seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self._open:
            outer = self._open[-1][0]
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def since_birth(self, name: str) -> None:
        """Book everything from the process's birth until now, less what is booked already, to `name`."""
        self.add(name, max(0.0, self._clock() - self.born_s - sum(self._seconds.values())))

    def now(self) -> str | None:
        """The phase under way with its seconds so far, for a heartbeat."""
        if not self._open:
            return None
        name, begin = self._open[-1]
        return f"start-up: {name}, {duration(self._clock() - begin)}"

    def phases(self) -> list[Phase]:
        """All phases in the order in which they were first booked."""
        return [Phase(name=name, seconds=max(0.0, seconds)) for name, seconds in self._seconds.items()]


class Heartbeat:
    """Says what is under way through `say`, on a daemon thread.

    Args:
        describe: What is under way, as "what, how long"; None when there is nothing worth a line.
        say: Takes the line.
        every_s: Seconds between looks; what was said already is said again only after `REPEAT_S`.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        describe: Callable[[], str | None],
        say: Callable[[str], None],
        every_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._describe, self._say, self._every_s, self._clock = describe, say, every_s, clock
        self._said, self._said_at = "", 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grpo-autotune-heartbeat", daemon=True)

    def beat(self) -> None:
        """Look once."""
        line = self._describe()
        if line is None:
            return
        what, now = line.rpartition(",")[0], self._clock()
        if what != self._said or now - self._said_at >= REPEAT_S:
            self._said, self._said_at = what, now
            self._say(line)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.beat()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
