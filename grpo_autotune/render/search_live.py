"""A search while it runs: a live panel on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from grpo_autotune.render.search import changes, value_words
from grpo_autotune.search.evaluator import Standing
from grpo_autotune.units import hms, percent, seconds

PLAIN_EVERY_S = 15.0
MOST_SKIPPED = 3
SHORT = 70
PURPOSES = {"probe": " (probe)", "timed": "", "rewards": " (rewards alone)", "worst_case": " (worst-case step)"}


class SearchView:
    """What `search` is told to tell; a context manager that gives the terminal back.

    Args:
        console: Where to write; made for standard error.
        clock: Seconds, monotonic.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self._said: int | None = None
        self._said_s = 0.0
        self._told = set[str]()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, standing: Standing) -> None:
        """Where the search stands now."""
        if self._live is not None:
            self._live.update(Padding(Group(*(Text(line) for line in panel(standing))), (0, 1)), refresh=True)
            return
        number, now = standing.trial.number if standing.trial else None, self._clock()
        if number != self._said or now - self._said_s >= PLAIN_EVERY_S:
            self._said, self._said_s = number, now
            self.say(plain_line(standing))
            for row in standing.skipped:
                if row.why not in self._told:
                    self._told.add(row.why)
                    self.say(f"not run: {row.count} combinations, {row.why}")


def panel(standing: Standing) -> list[str]:
    """The lines of the live view."""
    lines = [f"Search  {_left(standing)}, {standing.done} trials done", f"now     {_trial(standing)}"]
    if standing.own is not None and standing.best is not None:
        lines.append(f"own     {seconds(standing.own.step.value)} a step")
        lines.append(f"best    {_best(standing)}")
    for row in standing.skipped[:MOST_SKIPPED]:
        lines.append(f"skipped {row.count}: {row.why}")
    if "step" in standing.errors:
        lines.append(f"models  off by {percent(standing.errors['step']['median'])} at the median")
    return lines


def plain_line(standing: Standing) -> str:
    """The same in one line."""
    parts = [_left(standing), _trial(standing)]
    if standing.best is not None and standing.own is not None:
        parts.append(f"best x {standing.speedup:.2f}, own {seconds(standing.own.step.value)} a step")
    if "step" in standing.errors:
        parts.append(f"models off by {percent(standing.errors['step']['median'])}")
    return " | ".join(parts)


def _left(standing: Standing) -> str:
    if not standing.total_s:
        return "no budget: a probe, then a prediction"
    return f"{hms(standing.left_s)} of {hms(standing.total_s)} left"


def _trial(standing: Standing) -> str:
    trial, progress = standing.trial, standing.progress
    if trial is None:
        return "between two trials"
    name = f"trial {trial.number}{' (race)' if trial.source == 'race' else PURPOSES[trial.purpose]}"
    doing = "" if progress is None else f", {progress.stage}" + (f", step {progress.step}" if progress.step else "")
    return f"{name}{doing}: {changes_of(standing)}"


def changes_of(standing: Standing) -> str:
    """What the trial in hand changes, cut to a line's end."""
    text = ", ".join(f"{key.rpartition('.')[2]} {value_words(value)}" for key, value in standing.changed.items())
    if not text:
        return "your own configuration"
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def _best(standing: Standing) -> str:
    assert standing.best is not None and standing.own is not None
    changed = {key: value for key, value in standing.best.knobs.items() if standing.own.knobs.get(key) != value}
    step = seconds(standing.best.step.value)
    return f"x {standing.speedup:.2f}, {step} a step: {changes(changed, standing.own.knobs)}"
