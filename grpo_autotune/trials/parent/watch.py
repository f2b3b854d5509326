"""One trial in a worker's hands, as the parent watches it: look at it now and then until it has ended.

The three facts are the outcome file, the exit code and the age of the heartbeat. All ages are on the parent's own
clock, and a jump of that clock counts for nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.records.trial import OUTCOME_FILE, Progress, TrialSpec
from grpo_autotune.trials.endings import Ending
from grpo_autotune.trials.exit_codes import OTHER_ENGINE
from grpo_autotune.trials.heartbeat import UNHURRIED, HeartbeatReader
from grpo_autotune.trials.parent.worker import Worker

POLL_S = 0.02
JUMP_S = 10.0
"""More than this between two looks is a clock that jumped, or a machine that slept."""

Watch = Callable[[Progress], None]


class Stopwatch:
    """Seconds since construction by a clock that may jump either way."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self.seconds = 0.0

    def look(self) -> float:
        now = self._clock()
        passed = now - self._last
        self._last = now
        self.seconds += passed if 0.0 <= passed <= JUMP_S else 0.0
        return self.seconds


class AttemptEnd(NamedTuple):
    """The end of an attempt as the parent sees it."""

    ending: Ending | None = None  # the reason to end its worker; None where that ended by itself, or wrote an outcome
    code: int | None = None  # exit code of a worker that ended without an outcome
    taken_up: bool = True  # False where the worker ended before it took the trial up: another worker may run it


class Attempt:
    """A trial that was given to `worker`; `watch` is called with its progress whenever that changes."""

    def __init__(self, worker: Worker, spec: TrialSpec, folder: Path, clock: Callable[[], float], watch: Watch) -> None:
        self.worker, self.spec, self.folder = worker, spec, folder
        self.heartbeat = HeartbeatReader(folder)
        self.startup_s: float | None = None  # seconds until its first step
        self.idle = False  # it waits for its next block: then silence is no hang, and its limit does not run down
        self._watch, self._stopwatch = watch, Stopwatch(clock)
        self._moved_s = self._idle_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return self._stopwatch.look()

    def look(self) -> AttemptEnd | None:
        """Its end; None while it goes on."""
        code = self.worker.poll()
        before_s, now_s = self._stopwatch.seconds, self._stopwatch.look()
        if self.heartbeat.moved():
            self._moved_s = now_s
            if self.startup_s is None and self.heartbeat.began:
                self.startup_s = now_s
            self._watch(self.heartbeat.progress)
        if (self.folder / OUTCOME_FILE).exists() and (self.spec.world_size == 1 or code is not None):
            return AttemptEnd()
        if code is not None:
            return AttemptEnd(code=code, taken_up=self.heartbeat.seen and code != OTHER_ENGINE)
        if self.idle:
            self._idle_s += now_s - before_s
            self._moved_s = now_s
        return self._overdue(now_s - self._idle_s, now_s - self._moved_s)

    def _overdue(self, active_s: float, silent_s: float) -> AttemptEnd | None:
        spec, stage = self.spec, self.heartbeat.progress.stage
        if active_s > spec.limit_s:
            return AttemptEnd(Ending("timeout", f"over its limit of {spec.limit_s:g} s, in {stage}"))
        if self.heartbeat.began and silent_s > spec.hang_s and stage not in UNHURRIED:
            return AttemptEnd(Ending("hang", f"no sign of life for {spec.hang_s:g} s, in {stage}"))
        return None
