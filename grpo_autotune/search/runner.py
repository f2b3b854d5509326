"""The parent of trials: it starts a worker, watches three facts, kills what it started, and names every ending.

The facts are the outcome file, the exit code and the age of the heartbeat. The runner's own clock measures all ages; a
jump of it counts as one look.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.search.endings import Ending, clear, ending_of_exit, read_outcome
from grpo_autotune.search.processes import GuardedWorker, Worker, oom_kills
from grpo_autotune.search.pulse import PulseReader
from grpo_autotune.search.trial import LOG_FILE, OUTCOME_FILE, SPEC_FILE, Progress, TrialOutcome, TrialSpec
from grpo_autotune.search.worker import write_whole

LOOK_S = 0.02
JUMP_S = 10.0
"""More than this between two looks is a clock that jumped, or a machine that slept."""

Watch = Callable[[Progress], None]
Spawn = Callable[[Path, Path, int], Worker]


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


class Runner(AbstractContextManager["Runner"]):
    """Runs trials in child processes, one at a time, keeping the newest worker for the next trial that can use it.

    Args:
        run_dir: The run folder; trials live in `trials/0007` there.
        warm: Whether a worker may serve several trials.
        clock: Seconds, monotonic.
        wait: Sleeps for so many seconds between two looks.
        spawn: Starts a worker for a trial's folder, its log, and a number of ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        warm: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        spawn: Spawn = GuardedWorker,
    ) -> None:
        self._run_dir, self._warm, self._clock, self._wait, self._spawn = run_dir, warm, clock, wait, spawn
        self._worker: Worker | None = None
        self._key = ""

    def run(self, spec: TrialSpec, watch: Watch | None = None) -> TrialOutcome:
        """Run one trial to its end, whatever that is.

        Args:
            spec: The trial.
            watch: Told what the trial is doing whenever that changes.

        Returns:
            Its outcome, also in its folder. A failed trial is one, too.

        Raises:
            OSError: The run folder cannot be written.
            BaseException: What interrupts the wait, such as `KeyboardInterrupt`, once the trial is gone.
        """
        folder = prepare_folder(self._run_dir, spec)
        stopwatch, kills = Stopwatch(self._clock), oom_kills()
        try:
            seen = self._run(spec, folder, stopwatch, watch or (lambda progress: None))
            ending = ending_of_exit(seen.code, oom_kills() > kills) if seen.code is not None else seen.ending
            outcome = read_outcome(folder, spec, ending)
            if outcome.status != "ok" or not self._warm or worker_key(spec) is None:
                self.close()
        except BaseException:
            self.close()
            raise
        outcome = outcome.model_copy(update={"elapsed_s": stopwatch.look(), "startup_s": seen.startup_s})
        write_whole(folder / OUTCOME_FILE, outcome.model_dump_json(indent=1))
        return outcome

    def close(self) -> None:
        """End the worker and all it started, and wait until they are gone."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, spec: TrialSpec, folder: Path, stopwatch: Stopwatch, watch: Watch) -> Seen:
        if self._take(spec, folder):
            seen = self._watch(spec, folder, stopwatch, watch)
            if seen.heard:
                return seen
            self.close()  # it ended before it took the trial up
            self._take(spec, folder)
        return self._watch(spec, folder, stopwatch, watch)

    def _take(self, spec: TrialSpec, folder: Path) -> bool:
        """Give the trial to the worker there is, or to a new one; whether it is a warm one."""
        key = worker_key(spec)
        if self._worker is not None and key is not None and key == self._key and self._worker.order(folder):
            return True
        self.close()
        self._worker = self._spawn(folder, folder / LOG_FILE, spec.world_size)
        self._key = key or ""
        self._worker.order(folder)
        return False

    def _watch(self, spec: TrialSpec, folder: Path, stopwatch: Stopwatch, watch: Watch) -> Seen:
        """Look until the trial ends or must be ended."""
        assert self._worker is not None
        pulse, moved_s, startup_s = PulseReader(folder), stopwatch.look(), None
        while True:
            code = self._worker.poll()
            now_s = stopwatch.look()
            if pulse.moved():
                moved_s = now_s
                startup_s = now_s if startup_s is None and pulse.began else startup_s
                watch(pulse.progress)
            if (folder / OUTCOME_FILE).exists() and (spec.world_size == 1 or code is not None):
                return Seen(startup_s)
            if code is not None:
                return Seen(startup_s, code=code, heard=pulse.seen)
            overdue = _overdue(spec, pulse, now_s, now_s - moved_s)
            if overdue is not None:
                self.close()
                return Seen(startup_s, overdue)
            self._wait(LOOK_S)


class Seen(NamedTuple):
    """What the parent saw of a trial: seconds until its first step, and how it went if no outcome lies there."""

    startup_s: float | None
    ending: Ending = Ending()
    code: int | None = None
    heard: bool = True


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


def worker_key(spec: TrialSpec) -> str | None:
    """Trials of one key can share a worker; None where a trial needs one for itself.

    Without vLLM a worker keeps imports and data, and the model is loaded anew. With it the engine stays, so everything
    that TRL builds it from must be equal (trl/generation/vllm_generation.py, `_init_vllm`).
    """
    if spec.script is not None or spec.world_size > 1:
        return None
    model, grpo = dict(spec.config.get("model", {})), spec.config.get("grpo", {})
    if not grpo.get("use_vllm"):
        model = {name: model.get(name) for name in ("name_or_path", "random_init", "revision", "trust_remote_code")}
        return json.dumps(model, sort_keys=True)
    sizes = {name: grpo.get(name) for name in _ENGINE_SIZES}
    return json.dumps([model, spec.config.get("vllm"), sizes], sort_keys=True, default=str)


_ENGINE_SIZES = (
    "per_device_train_batch_size",
    "steps_per_generation",
    "generation_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
)


def _overdue(spec: TrialSpec, pulse: PulseReader, now_s: float, silent_s: float) -> Ending | None:
    stage = pulse.progress.stage
    if now_s > spec.limit_s:
        return Ending("timeout", f"over its limit of {spec.limit_s:g} s, in {stage}")
    if pulse.began and silent_s > spec.hang_s:
        return Ending("hang", f"no sign of life for {spec.hang_s:g} s, in {stage}")
    return None
