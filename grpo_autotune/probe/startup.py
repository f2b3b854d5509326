"""Seconds of start-up by phase."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from grpo_autotune.records.probe import Phase
from grpo_autotune.seams.layers import Layer, Next
from grpo_autotune.units import duration

LEAST_S, STALL_S = 1.0, 60.0
"""Ages from which a phase is worth a line, and a word on what may hold it up."""
LOOK_AT = {
    "import": "a cold or remote disk, a busy machine",
    "data": "a download, a slow disk, images that are resized once",
    "model": "a download, a slow disk",
    "engine": "vLLM's last lines, for a server in serve.log",
    "trainer": "another rank that has not come",
    "script": "the script's own work",
    "generation": "kernels that compile, max_completion_length, vLLM's last lines",
    "reward": "a reward that waits for a server or a lock",
    "sync_wait": "another rank, which is behind or has ended",
    "": "its endpoint, which has not answered: address, key, proxy, log",
}
"""Phase of start-up, or stage of the first step -> what may hold it up; other phases are rewards over a network."""


class Startup:
    """Seconds of each phase before the first step; a phase inside another is not counted in the outer one.

    The clock tells seconds since the epoch, as the operating system gives the process's birth (`born_s`)."""

    def __init__(self, clock: Callable[[], float] = time.time, born_s: float | None = None) -> None:
        self._clock = clock
        self.tell: Callable[[str], None] = lambda name: None  # given the name of each phase as it begins
        self.born_s = psutil.Process().create_time() if born_s is None else born_s
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        begin = self._clock()
        self._open.append((name, begin))
        self.tell(name)
        try:
            yield
        finally:
            self._open.pop()
            self.add(name, self._clock() - begin)

    @contextlib.contextmanager
    def imports(self) -> Iterator[None]:
        """Count the time since the process began, and that inside, as `import`.

        Libraries make a million objects that live as long as the process: looking through them for garbage is a third
        of the import, and after it of every full collection, so they are left out of both."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            with self.phase("import"):
                yield
        finally:
            if not gc.get_freeze_count():  # later it would keep what an earlier trial of this process left
                gc.freeze()
            if collecting:
                gc.enable()
        self.since_birth("import")

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self._open:
            outer = self._open[-1][0]
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def first_step(self, stages: Mapping[str, float]) -> None:
        """Add the first step by stage: its generation and its rewards apart."""
        apart = {"generation": "first_generation", "reward": "first_reward"}
        for name in sorted(stages, key=lambda stage: stage not in apart):
            self.add(apart.get(name, "first_update"), stages[name])

    def since_birth(self, name: str) -> None:
        """Count the time since the process began, less that of all phases, as `name`."""
        self.add(name, max(0.0, self._clock() - self.born_s - sum(self._seconds.values())))

    def now(self) -> str | None:
        """The phase under way with its seconds so far, for a heartbeat; None before it is worth a line."""
        if not self._open:
            return None
        name, begin = self._open[-1]
        age_s = self._clock() - begin
        look_at = hint(name if name in LOOK_AT else "", age_s)
        return f"start-up: {name}{look_at}, {duration(age_s)}" if age_s >= LEAST_S else None

    def phases(self) -> list[Phase]:
        """All phases in the order in which they were first counted."""
        return [Phase(name=name, seconds=max(0.0, seconds)) for name, seconds in self._seconds.items()]


def hint(name: str | None, age_s: float) -> str:
    """A bracket with what may hold up a phase or stage, once it is old."""
    return f" (look at: {LOOK_AT[name]})" if name in LOOK_AT and age_s >= STALL_S else ""


def timed(phase: Callable[[str], contextlib.AbstractContextManager[None]], name: str) -> Layer:
    """A layer that counts the time of every call as the start-up phase `name`."""

    def layer(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return call_next(*args, **kwargs)

    return layer
