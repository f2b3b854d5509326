"""One trial in a worker's hands, as the parent watches it: look at it now and then until it has ended.

The three facts are the outcome file, the exit code and the age of the heartbeat. All ages are on the parent's own
clock, and a jump of that clock counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.files import write_whole
from grpo_autotune.processes.guarded import Worker
from grpo_autotune.records.trial import OUTCOME_FILE, SPEC_FILE, Progress, TrialSpec
from grpo_autotune.trials.child.warm_state import NeedsFreshWorker
from grpo_autotune.trials.heartbeat import PulseReader
from grpo_autotune.trials.parent.endings import Ending, clear

LOOK_S = 0.02
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
        """Seconds so far."""
        now = self._clock()
        passed = now - self._last
        self._last = now
        self.seconds += passed if 0.0 <= passed <= JUMP_S else 0.0
        return self.seconds


class Seen(NamedTuple):
    """How a trial went as seen from outside: its exit code, or why it must be ended; neither where an outcome lies.

    `heard` is false where the worker ended without taking the trial up: another one may.
    """

    ending: Ending = Ending()
    code: int | None = None
    heard: bool = True


class Attempt:
    """A trial that was given to `worker`.

    Args:
        worker: The worker.
        spec: The trial.
        folder: Its folder.
        clock: Seconds, monotonic.
        watch: Told what the trial is doing whenever that changes.

    Attributes:
        startup_s: Seconds until its first step; None before.
        idle: Whether it waits for its turn: then silence is no hang, and its limit does not run down.
    """

    def __init__(self, worker: Worker, spec: TrialSpec, folder: Path, clock: Callable[[], float], watch: Watch) -> None:
        self.worker, self.spec, self.folder = worker, spec, folder
        self.pulse = PulseReader(folder)
        self.startup_s: float | None = None
        self.idle = False
        self._watch, self._stopwatch = watch, Stopwatch(clock)
        self._moved_s = self._idle_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was given."""
        return self._stopwatch.look()

    def look(self) -> Seen | None:
        """What has come of it; None while it goes on."""
        code = self.worker.poll()
        before_s, now_s = self._stopwatch.seconds, self._stopwatch.look()
        if self.pulse.moved():
            self._moved_s = now_s
            if self.startup_s is None and self.pulse.began:
                self.startup_s = now_s
            self._watch(self.pulse.progress)
        if (self.folder / OUTCOME_FILE).exists() and (self.spec.world_size == 1 or code is not None):
            return Seen()
        if code is not None:
            return Seen(code=code, heard=self.pulse.seen and code != NeedsFreshWorker.CODE)
        if self.idle:
            self._idle_s += now_s - before_s
            self._moved_s = now_s
        return self._overdue(now_s - self._idle_s, now_s - self._moved_s)

    def _overdue(self, active_s: float, silent_s: float) -> Seen | None:
        spec, stage = self.spec, self.pulse.progress.stage
        if active_s > spec.limit_s:
            return Seen(Ending("timeout", f"over its limit of {spec.limit_s:g} s, in {stage}"))
        if self.pulse.began and silent_s > spec.hang_s:
            return Seen(Ending("hang", f"no sign of life for {spec.hang_s:g} s, in {stage}"))
        return None


def prepare_folder(run_dir: Path, spec: TrialSpec) -> Path:
    """Make the trial's folder, and put the spec into it.

    Raises:
        OSError: It cannot be written.
    """
    folder = run_dir / "trials" / f"{spec.number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    write_whole(folder / SPEC_FILE, spec.model_dump_json(indent=1))
    return folder
