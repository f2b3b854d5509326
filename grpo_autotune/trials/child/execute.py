"""One trial in this process, from its spec to its outcome: the worker's boundary, where every error becomes a status.

After it the process is as a new one would be: no trainer, memory given back, and before the next trial the random
stream set by that trial's own seed, so that a warm worker trains as a fresh one does.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.rollout.parts import engine_of
from grpo_autotune.rollout.server.process import address_keys, leave_gpus
from grpo_autotune.seams.torchvision_compat import ensure_torchvision
from grpo_autotune.seams.trainer_access import SPEED_UPS
from grpo_autotune.trials.child.collectives import collective_limit
from grpo_autotune.trials.child.memory import MemoryMeter, available_bytes, clear_finished_frames, most_bytes, release
from grpo_autotune.trials.child.script import run_script
from grpo_autotune.trials.child.warm_state import DataCache, EngineCache
from grpo_autotune.trials.endings import ending_of_error
from grpo_autotune.trials.heartbeat import HeartbeatWriter

if TYPE_CHECKING:
    from grpo_autotune.trials.child.measure import Measurement

DEFAULT_SEED = 42
"""Of transformers' `TrainingArguments.seed`."""


class TrialExecutor:
    """Runs trials in this process, one after another.

    Attributes:
        reusable: True while nothing of the trials so far is in the way of another.
    """

    def __init__(self) -> None:
        self.reusable = True
        self._data = DataCache()
        self._engine: EngineCache | None = None
        self._idle_bytes: int | None = None
        self._gpus_left = False
        self._model: Callable[[], Any] = lambda: None

    def execute(self, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter) -> TrialOutcome:
        """Run the trial; whatever it raises becomes its outcome, and a traceback in the log.

        Raises:
            SystemExit: Of a reward or a script, or `NeedsFreshWorker`.
        """
        meter = MemoryMeter()
        try:
            if spec.script is None:
                measured = self._run_config(spec, folder, startup, heartbeat, meter)
            else:
                measured = run_script(spec, folder, startup, heartbeat, meter.restart)
        except Exception as error:  # noqa: BLE001 - the one boundary: a failed trial is data
            self.reusable = False
            ending, most = ending_of_error(error, available_bytes), most_bytes()
            _forget_frames(error)  # they hold the trainer
            release()
            with contextlib.suppress(OSError):  # a full disk, which may be what went wrong
                sys.stderr.write("".join(traceback.format_exception(error)))
            return self._outcome(spec, meter.peak_bytes(), meter, {"most_bytes": most, **ending._asdict()})
        peak_bytes, most = meter.peak_bytes(), most_bytes()
        release()
        if self._model() is not None:
            clear_finished_frames()
            release()
        self.reusable = spec.script is None and self._model() is None
        return self._outcome(spec, peak_bytes, meter, {"status": "ok", "most_bytes": most, **measured._asdict()})

    def _outcome(self, spec: TrialSpec, peak_bytes: int, meter: MemoryMeter, facts: dict[str, Any]) -> TrialOutcome:
        """Idle is what this process held before its first model: what libraries and an engine keep counts as needed."""
        if self._idle_bytes is None:
            self._idle_bytes = meter.idle_bytes
        return TrialOutcome(number=spec.number, peak_bytes=peak_bytes, idle_bytes=self._idle_bytes, **facts)

    def _run_config(
        self, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter, meter: MemoryMeter
    ) -> Measurement:
        config = RunConfig.from_dict(spec.config)
        if not self._gpus_left:
            leave_gpus(config)
            self._gpus_left = True
        with startup.phase("import"):
            ensure_torchvision()
            from accelerate.state import AcceleratorState, GradientState
            from transformers import set_seed

            from grpo_autotune.train.trainer import build_trainer  # noqa: F401 - what it imports is idle, no trial's
            from grpo_autotune.train.trial_trainer import quiet_trainer
            from grpo_autotune.trials.child.measure import measure
        startup.since_birth("import")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if self._engine is None:
            self._engine = EngineCache()
        self._engine.forget_ranks()
        meter.restart()
        set_seed(int(config.grpo.get("seed", DEFAULT_SEED)))
        overrides: dict[str, Any] = {} if spec.server_port is None else dict(address_keys(spec.server_port))
        overrides |= collective_limit(spec, config.grpo.get("ddp_timeout"))
        trainer = quiet_trainer(config, startup, say, self._data.load, overrides, folder)
        self._model = weakref.ref(trainer.model)
        try:
            return measure(trainer, spec, folder, startup, heartbeat, trainer.train)
        finally:
            if (speed_ups := getattr(trainer, SPEED_UPS, None)) is not None:
                speed_ups.remove()  # their layers on TRL's functions hold the trainer
            _detach_engine(trainer)


def _detach_engine(trainer: Any) -> None:
    """Take off the engine, which this process keeps, all that holds the trainer."""
    engine = engine_of(getattr(trainer, "vllm_generation", None))
    if engine is not None:
        engine.take_off()


def _forget_frames(error: BaseException | None) -> None:
    cleared: set[int] = set()
    while error is not None and id(error) not in cleared:
        cleared.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
