"""Blocks of an interleaved trial: it runs as many as its parent allows, and waits outside its own steps' time.

A waiting child holds its memory and leaves the processor alone.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.hardware.device_memory import cuda_in_use
from grpo_autotune.seams.layers import Next, take_off
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.trials.block_limit import WAITING, block_limit
from grpo_autotune.trials.heartbeat import HeartbeatWriter

POLL_S, MOST_POLL_S = 0.01, 0.2
POLL_SHARE = 0.1
"""Part of the time waited so far that passes before the next look: a hundred a second take 2 % of a core. Of several
ranks, which have to go on at once, all look as often as at first."""
WITHOUT_END = 1_000_000
"""Optimizer steps that no race reaches."""


class BlockSchedule(TrainerCallback):  # type: ignore[misc]
    """Holds a trainer, which has its probe already, at the end of each block of `block` optimizer steps until the
    parent allows the next. The heartbeat tells how many are done, and a step's time begins anew after a wait."""

    def __init__(self, trainer: Any, folder: Path, probe: Any, heartbeat: HeartbeatWriter, block: int) -> None:
        self._trainer, self._folder, self._probe, self._heartbeat = trainer, folder, probe, heartbeat
        self._block, self._first, self._last = block, 0, 0
        self._handles = wrap_seams(trainer, log_save_evaluate=self._after_step)
        trainer.add_callback(self)

    def remove(self) -> None:
        take_off(self._handles)
        self._trainer.remove_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = self._last = state.global_step
        self._hold()

    def _after_step(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        result = call_next(*args, **kwargs)
        if self._trainer.state.global_step != self._last:
            self._last = self._trainer.state.global_step
            self._hold()
        return result

    def _hold(self) -> None:
        """At a block's end, wait until the next is allowed; then its first step begins."""
        done = self._last - self._first
        beyond, within = divmod(done - self._probe.warmup, self._block)
        if done and (beyond < 0 or within):
            self._stop_if_told()
            return
        blocks = beyond + 1 if done else 0
        if (cuda := cuda_in_use()) is not None:
            cuda.synchronize()  # what this trial has queued must not run in another's block
        self._heartbeat.beat(f"{WAITING}{blocks}")
        begun_s, most_s = time.monotonic(), MOST_POLL_S if self._trainer.accelerator.num_processes == 1 else POLL_S
        while (limit := block_limit(self._folder)) is not None and limit <= blocks:
            time.sleep(min(most_s, max(POLL_S, POLL_SHARE * (time.monotonic() - begun_s))))
        self._stop_if_told()
        self._heartbeat.beat("step")
        self._probe.recorder.open_root()

    def _stop_if_told(self) -> None:
        if block_limit(self._folder) is None:
            self._trainer.control.should_training_stop = True
