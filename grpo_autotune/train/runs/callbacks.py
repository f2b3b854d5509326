"""The log and the progress of a run, a JSON line for each log event and one line on the terminal, and the steps of a
measurement: a run stops after them, its schedule unchanged, or goes on for as many."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import TrainerCallback

from grpo_autotune.console import ProgressBar
from grpo_autotune.units import duration

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines where standard error is no terminal."""

PAGE_EVERY_S = 60.0
"""Least seconds between two pages of a run."""

PAGE_COST = 100
"""Seconds between two pages for each second that the last one took: at most a hundredth goes into them."""

RECENT_STEPS = 20
"""Steps that the shown seconds per step are a mean of."""


class TrainLog(TrainerCallback):  # type: ignore[misc]
    """Appends a JSON line per log event: `kind` train or eval, `step`, `time` (Unix seconds), `step_s`, TRL's metrics.
    Lines of `earlier` stay; `last` is the newest of each kind, of before a resume too, `row` the latest event's."""

    def __init__(self, path: Path, memory: Callable[[], float] = lambda: 0.0) -> None:
        self._path, self._memory, self._since_s, self._since_step = path, memory, 0.0, 0
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.earlier: list[dict[str, Any]] = list(map(json.loads, lines))
        self.last: dict[str, dict[str, Any]] = {line["kind"]: line for line in self.earlier}
        self.row: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since_s, self._since_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.row = None
        if not logs or "train_runtime" in logs:  # transformers' closing summary
            return
        kind = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        line: dict[str, Any] = {"kind": kind, "step": state.global_step, "time": round(time.time(), 3)}
        if kind == "train":
            line["step_s"] = self._seconds_per_step(state.global_step)
            line["memory_share"] = self._memory()
        line.update({name: _json_number(value) for name, value in logs.items()})
        self.last[kind] = self.row = line
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _seconds_per_step(self, step: int) -> float | None:
        """Mean wall seconds since the last train event, whatever they were spent on."""
        now, steps = time.time(), step - self._since_step
        seconds = round((now - self._since_s) / steps, 4) if steps else None
        self._since_s, self._since_step = now, step
        return seconds


class AfterLog(TrainerCallback):  # type: ignore[misc]
    """Has `write` write a page of the run after log events, a minute or more apart; it raises nothing."""

    def __init__(self, write: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._next_s = write, clock, clock() + PAGE_EVERY_S

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin_s = self._clock()
        if state.is_world_process_zero and begin_s >= self._next_s:
            self._write()
            self._next_s = max(begin_s + PAGE_EVERY_S, self._clock() + PAGE_COST * (self._clock() - begin_s))


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """Step, reward, KL, seconds per step and time left: a live line on a terminal, else a plain one now and then.

    `metrics` gives TRL's since the last log event (`trainer._metrics["train"]`), and is asked after each step.
    """

    def __init__(
        self,
        metrics: Callable[[], Mapping[str, list[float]]],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._console, self._clock = metrics, console, clock
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._shown: dict[str, float] = {}
        self._bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(self._clock())
        if state.is_world_process_zero:
            self._bar = ProgressBar("training", state.max_steps, self._console, self._clock)
            self._bar.update(state.global_step, "first step", None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(self._clock())
        for name in ("reward", "kl"):
            values = self._metrics().get(name)
            if values:
                self._shown[name] = values[-1]
        if self._bar is None:
            return
        step, total = state.global_step, state.max_steps
        line = self._line(step, total)
        self._bar.update(step, line, f"step {step}/{total}  {line}", PLAIN_INTERVAL_S)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self._ends) == 1:  # an evaluation before the first step is no part of it
            self._ends[0] = self._clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; to be called where training ends by an exception, too."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, step: int, total: int) -> str:
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        shown = "".join(f"{label} {self._shown[name]:.4f}  " for name, label in _LABELS if name in self._shown)
        shown = shown.replace("reward nan", "no reward")  # no score of the step could be had
        return f"{shown}{seconds:.2f} s/step  {duration(seconds * (total - step))} left"


_LABELS = (("reward", "reward"), ("kl", "KL"))


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Enough(NamedTuple):
    """A run may stop early: once `steps` were done, or a multiple of `every` more, and it has trained for `seconds`.

    By this process's own clock: ranks would disagree."""

    steps: int
    every: int
    seconds: float


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ask the trainer to stop once `steps` optimizer steps, which may be raised later, were done from where it began;
    `on_step` is told each."""

    def __init__(
        self, steps: int, on_step: Callable[[int], None] = lambda done: None, enough: Enough | None = None
    ) -> None:
        self.steps, self._on_step, self._enough = steps, on_step, enough
        self._begin, self._begun_s = 0, 0.0
        self.is_reached = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin, self._begun_s = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._begin
        self._on_step(done)
        if done >= self.steps or self._is_enough(done):
            self.is_reached = control.should_training_stop = True

    def _is_enough(self, done: int) -> bool:
        if self._enough is None:
            return False
        more, rest = divmod(done - self._enough.steps, self._enough.every)
        return more >= 0 and not rest and time.monotonic() - self._begun_s >= self._enough.seconds


def outlast(trainer: Any, steps: int) -> None:
    """Let a run that is configured for fewer than `steps` optimizer steps go on that long."""
    args = trainer.args
    if 0 < args.max_steps < steps:
        args.max_steps = steps
    elif args.max_steps <= 0:
        rows = getattr(trainer.train_dataset, "__len__", lambda: 0)()
        prompts = args.generation_batch_size / trainer.num_generations
        generations = math.floor(rows / prompts) * args.num_train_epochs
        a_generation = args.steps_per_generation * trainer.num_iterations / args.gradient_accumulation_steps
        if generations * a_generation < steps:
            args.max_steps = steps
