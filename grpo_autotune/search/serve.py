"""One trial in this process, from its spec to its outcome: the worker's boundary, where every error becomes a status.

After it the process is as a new one would be: no trainer, memory given back, and before the next trial the random
stream set by that trial's own seed, so that a warm worker trains as a fresh one does.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_autotune.config import RunConfig
from grpo_autotune.probe.startup import Startup
from grpo_autotune.seams.compat import ensure_torchvision
from grpo_autotune.search.failures import failure_of, log_of
from grpo_autotune.search.memory import MemoryMeter, available_bytes, in_use, release
from grpo_autotune.search.pulse import Pulse
from grpo_autotune.search.script_trial import run_script
from grpo_autotune.search.trial import TrialOutcome, TrialSpec

if TYPE_CHECKING:
    from grpo_autotune.search.measure import Measured

LEFT_OVER = 0.25
"""Share of what a trial took that may stay behind; above it the process is not used again."""

FIRST_USE_BYTES = 512 << 20
"""What libraries keep for good once they were used first, whatever the trial was."""

DEFAULT_SEED = 42
"""Of transformers' `TrainingArguments.seed`."""


def serve(spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse) -> TrialOutcome:
    """Run the trial; whatever it raises becomes its outcome, and a traceback in the log."""
    meter = MemoryMeter()
    try:
        if spec.script is None:
            measured = _run_config(spec, folder, startup, pulse, meter)
        else:
            measured = run_script(spec, folder, startup, pulse, meter.restart)
    except Exception as error:  # noqa: BLE001 - the one boundary: a failed trial is data
        failure = failure_of(error, available_bytes)
        _forget_frames(error)  # they hold the trainer
        release()
        with contextlib.suppress(OSError):  # a full disk, which may be what went wrong
            sys.stderr.write(log_of(error))
        return TrialOutcome(
            number=spec.number, **failure._asdict(), peak_bytes=meter.peak_bytes(), idle_bytes=meter.idle_bytes
        )
    peak_bytes = meter.peak_bytes()
    release()
    return TrialOutcome(
        number=spec.number, status="ok", peak_bytes=peak_bytes, idle_bytes=meter.idle_bytes, **measured._asdict()
    )


def reusable(spec: TrialSpec, outcome: TrialOutcome) -> bool:
    """Whether what the trial left behind is little beside what it took; a script leaves everything."""
    if spec.script is not None or outcome.peak_bytes is None or outcome.idle_bytes is None:
        return False
    return in_use() - outcome.idle_bytes <= max(LEFT_OVER * (outcome.peak_bytes - outcome.idle_bytes), FIRST_USE_BYTES)


def _run_config(spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse, meter: MemoryMeter) -> Measured:
    config = RunConfig.from_dict(spec.config)
    with startup.phase("import"):
        ensure_torchvision()
        from accelerate.state import AcceleratorState, GradientState
        from transformers import set_seed

        from grpo_autotune.search.measure import measure
        from grpo_autotune.train.trainer import build_trainer  # noqa: F401 - what it imports is idle, no trial's
        from grpo_autotune.train.trials import quiet_trainer
    startup.since_birth("import")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    meter.restart()
    set_seed(int(config.grpo.get("seed", DEFAULT_SEED)))
    trainer = quiet_trainer(config, startup, _say)
    return measure(trainer, spec, folder, startup, pulse, trainer.train)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
