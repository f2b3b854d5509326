"""What a run tells while it goes on: a JSON line for each log event, and one line on the terminal."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from grpo_autotune.units import duration

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines where standard error is no terminal."""

RECENT_STEPS = 20
"""Steps that the shown seconds a step are a mean of."""


class TrainLog(TrainerCallback):  # type: ignore[misc]
    """Appends one JSON line a log event: `kind` train or eval, `step`, `time` (Unix seconds), `step_s`, TRL's metrics.

    Args:
        path: The file; lines already there stay.
        clock: Unix seconds.

    Attributes:
        last: The newest line of each kind, those of before a resume included.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._since_s = 0.0
        self._since_step = 0
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.last: dict[str, dict[str, Any]] = {line["kind"]: line for line in map(json.loads, lines)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since_s, self._since_step = self._clock(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:  # transformers' closing summary
            return
        kind = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        line: dict[str, Any] = {"kind": kind, "step": state.global_step, "time": round(self._clock(), 3)}
        if kind == "train":
            line["step_s"] = self._seconds_a_step(state.global_step)
        line.update({name: _json_number(value) for name, value in logs.items()})
        self.last[kind] = line
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _seconds_a_step(self, step: int) -> float | None:
        """Mean wall seconds since the last train event, whatever they were spent on."""
        now, steps = self._clock(), step - self._since_step
        seconds = round((now - self._since_s) / steps, 4) if steps else None
        self._since_s, self._since_step = now, step
        return seconds


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """Step, reward, KL, seconds a step and time left: a live line on a terminal, else a plain one now and then.

    Args:
        metrics: TRL's metrics since the last log event (`trainer._metrics["train"]`), read after each step.
        console: Where to write; made for standard error.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Callable[[], Mapping[str, list[float]]],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._console = console
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._shown: dict[str, float] = {}
        self._printed_s = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(self._clock())
        if state.is_world_process_zero and self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[line]}"), console=self._console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, line="first step")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(self._clock())
        for name in ("reward", "kl"):
            values = self._metrics().get(name)
            if values:
                self._shown[name] = values[-1]
        if not state.is_world_process_zero:
            return
        line = self._line(state.global_step, state.max_steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, line=line)
        elif self._ends[-1] - self._printed_s >= PLAIN_INTERVAL_S or state.global_step == state.max_steps:
            self._printed_s = self._ends[-1]
            self._print(f"step {state.global_step}/{state.max_steps}  {line}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if len(self._ends) == 1:  # an evaluation before the first step is no part of it
            self._ends[0] = self._clock()
        reward = (metrics or {}).get("eval_reward")
        if state.is_world_process_zero and reward is not None:
            self._print(f"evaluation at step {state.global_step}: reward {reward:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; to be called where training ends by an exception, too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, step: int, total: int) -> str:
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        shown = "".join(f"{label} {self._shown[name]:.4f}  " for name, label in _LABELS if name in self._shown)
        return f"{shown}{seconds:.2f} s/step  {duration(seconds * (total - step))} left"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


_LABELS = (("reward", "reward"), ("kl", "KL"))


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
