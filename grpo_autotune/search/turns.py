"""Trials that take turns: each goes on only to the step it was last allowed, and waits outside its own steps' time.

The parent writes the number of optimizer steps that a trial may have done (or the word to stop) into the file `turn` of
its folder; the child looks there after each step. A waiting child holds its memory and leaves the processor alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.seams.layers import Handle, wrap
from grpo_autotune.seams.table import find, slot_of
from grpo_autotune.search.pulse import Pulse

TURN_FILE = "turn"
STOP = "stop"
WAITING = "waiting for its turn"
LOOK_S = 0.01


def allow(folder: Path, steps: int | None) -> None:
    """Let the trial in `folder` go on until it has done `steps` steps in all; None ends it."""
    part = folder / f"{TURN_FILE}.part"
    part.write_text(STOP if steps is None else str(steps))
    part.replace(folder / TURN_FILE)


class Turns(TrainerCallback):  # type: ignore[misc]
    """The child's side, put around a trainer that has a probe already.

    Args:
        trainer: The trainer.
        folder: The trial's folder; without a `turn` file there when training begins, the trial goes through at once.
        probe: Its probe; a step's time begins anew after a wait.
        pulse: The heartbeat, which tells the parent that a block is done.
    """

    def __init__(
        self, trainer: Any, folder: Path, probe: Any, pulse: Pulse, wait: Callable[[float], None] = time.sleep
    ):
        self._trainer, self._path, self._probe, self._pulse, self._wait = (
            trainer, folder / TURN_FILE, probe, pulse, wait,
        )  # fmt: skip
        self._handles: list[Handle] = []
        self._first = self._last = 0
        if not self._path.exists():
            return
        slot = slot_of(trainer, find("log_save_evaluate"))
        if slot is not None:
            self._handles.append(wrap(slot, self._after_step))
        trainer.add_callback(self)

    def remove(self) -> None:
        """Leave the trainer as it was."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._trainer.remove_callback(self)
        self._handles = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = self._last = state.global_step
        self._hold()

    def _after_step(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        found = call_next(*args, **kwargs)
        if self._trainer.state.global_step != self._last:
            self._last = self._trainer.state.global_step
            self._hold()
        return found

    def _hold(self) -> None:
        """Wait until the next step is allowed; then the step begins."""
        waited = False
        while True:
            allowed = self._path.read_text()
            if allowed == STOP:
                self._trainer.control.should_training_stop = True
                break
            if int(allowed) > self._last - self._first:
                break
            if not waited:
                self._drain()
                self._pulse.beat(WAITING)
                waited = True
            self._wait(LOOK_S)
        if waited:
            self._probe.recorder.open_root()

    def _drain(self) -> None:
        """Let the device finish: what this trial has still queued must not run in another's turn."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        os.sched_yield()
