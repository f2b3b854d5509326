"""One trial in this process, from its spec to its outcome: the worker's boundary, where every error becomes a status.

After it the process is as a new one would be: no trainer, memory given back, and before the next trial the random
stream set by that trial's own seed, so that a warm worker trains as a fresh one does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.hardware.device_memory import expand_segments
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.rollout.parts import engine_of
from grpo_autotune.rollout.server.process import address_keys, leave_gpus
from grpo_autotune.seams.torchvision_compat import ensure_torchvision
from grpo_autotune.seams.trainer_access import SPEED_UPS
from grpo_autotune.trials.child.collectives import collective_limit
from grpo_autotune.trials.child.memory import (
    Idle,
    MemoryMeter,
    available_bytes,
    clear_finished_frames,
    most_bytes,
    release,
)
from grpo_autotune.trials.child.script import run_script
from grpo_autotune.trials.child.warm_state import DataCache, EngineCache
from grpo_autotune.trials.endings import ending_of_error
from grpo_autotune.trials.heartbeat import HeartbeatWriter

if TYPE_CHECKING:
    from grpo_autotune.trials.child.measure import Measurement

DEFAULT_SEED = 42
"""Of transformers' `TrainingArguments.seed`."""


class TrialExecutor:
    """Runs trials in this process, one after another."""

    def __init__(self) -> None:
        self.reusable = True  # nothing of the trials so far is in the way of another
        self._data = DataCache()
        self._engine: EngineCache | None = None
        self._idle: Idle | None = None
        self._gpus_left = False
        self._model: Callable[[], Any] = lambda: None

    def execute(self, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter) -> TrialOutcome:
        """Run the trial; whatever it raises becomes its outcome, and a traceback in the log, but a SystemExit: that of
        a reward or a script, or `NeedsFreshWorker`."""
        meter = MemoryMeter()
        try:
            if spec.script is None:
                measured = self._run_config(spec, folder, startup, heartbeat, meter)
            else:
                measured = run_script(spec, folder, startup, heartbeat, meter.restart)
            figures, most = self._figures(meter), most_bytes()
            release()
            if self._model() is not None:
                clear_finished_frames()
                release()
        except Exception as error:  # noqa: BLE001 - the one boundary: a failed trial is data
            self.reusable = False
            ending, most = ending_of_error(error, available_bytes), most_bytes()
            _forget_frames(error)  # they hold the trainer
            try:
                release()
            except RuntimeError as failure:  # a library's error was the first sign that the device failed
                ending = ending_of_error(failure, available_bytes)
            with contextlib.suppress(OSError):  # a full disk, which may be what went wrong
                sys.stderr.write("".join(traceback.format_exception(error)))
            figures = self._figures(meter, ran_out=ending.status == "oom")
            return TrialOutcome(number=spec.number, most_bytes=most, **figures, **ending._asdict())
        self.reusable = spec.script is None and self._model() is None
        return TrialOutcome(number=spec.number, status="ok", most_bytes=most, **figures, **measured._asdict())

    def _figures(self, meter: MemoryMeter, *, ran_out: bool = False) -> dict[str, Any]:
        """Idle is what this process held before its first model: what libraries and an engine keep counts as needed."""
        self._idle = meter.idle = self._idle or meter.idle
        return meter.facts(ran_out=ran_out)

    def _run_config(
        self, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter, meter: MemoryMeter
    ) -> Measurement:
        config = RunConfig.from_dict(spec.config)
        if not self._gpus_left:
            leave_gpus(config)
            self._gpus_left = True
        with startup.imports():
            load_libraries()
            from accelerate.state import AcceleratorState, GradientState
            from transformers import set_seed

            from grpo_autotune.train.rewards.without_model import is_asking
            from grpo_autotune.train.trial_trainer import quiet_trainer
            from grpo_autotune.trials.child.cores import keep_to
            from grpo_autotune.trials.child.measure import measure
        keep_to(spec.cores)
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
        for function in filter(is_asking, trainer.reward_funcs):
            function.remote.cache = None  # an earlier trial's rows would take no time
        try:
            return measure(trainer, spec, folder, startup, heartbeat, trainer.train)
        finally:
            if (speed_ups := getattr(trainer, SPEED_UPS, None)) is not None:
                speed_ups.remove()  # their layers on TRL's functions hold the trainer
            if (engine := engine_of(getattr(trainer, "vllm_generation", None))) is not None:
                engine.take_off()  # this process keeps it: nothing on it may hold the trainer


def load_libraries() -> None:
    """Import what every trial needs: it is idle memory, no trial's."""
    expand_segments(os.environ)
    ensure_torchvision()
    from grpo_autotune.train.trainer import build_trainer  # noqa: F401
    from grpo_autotune.trials.child import cores, measure  # noqa: F401


def _forget_frames(error: BaseException | None) -> None:
    cleared: set[int] = set()
    while error is not None and id(error) not in cleared:
        cleared.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
