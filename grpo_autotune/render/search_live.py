"""A search while it runs: a live panel on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from grpo_autotune.records.probe import STAGE_WORDS
from grpo_autotune.records.search import SearchProgress
from grpo_autotune.records.trial import Progress
from grpo_autotune.render.search import changes, value_text
from grpo_autotune.units import hms, percent, plural, seconds

PLAIN_EVERY_S = 15.0
MOST_SKIPPED = 3
SHORT = 70
PURPOSES = {"probe": " (probe)", "timed": "", "rewards": " (rewards alone)", "worst_case": " (worst-case step)"}


class SearchView:
    """View of a running search on a console made for standard error; a context manager that gives the terminal back."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self.tell: Callable[[SearchProgress], None] = lambda state: None  # given each state, too
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self._printed_trials, self._now = set[int](), dict[str | None, str]()  # the latter by place
        self._printed_s, self._printed_reasons = 0.0, set[str]()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, state: SearchProgress) -> None:
        self.tell(state)
        place = state.trial.place
        for other in [other for other in self._now if place is None or other is None]:
            del self._now[other]
        self._now[place] = _trial(state)
        if self._live is not None:
            lines = panel(state, list(self._now.values()))
            self._live.update(Padding(Group(*map(Text, lines)), (0, 1)), refresh=True)
            return
        number, now = state.trial.number, self._clock()
        if number not in self._printed_trials or now - self._printed_s >= PLAIN_EVERY_S:
            self._printed_trials.add(number)
            self._printed_s = now
            self.say(plain_line(state))
            skipped = {row.why: f"not run: {plural(row.count, 'combination')}, {row.why}" for row in state.skipped}
            for why, line in {**skipped, **dict(zip(state.said, state.said, strict=True))}.items():
                if why not in self._printed_reasons:
                    self._printed_reasons.add(why)
                    self.say(line)


def panel(state: SearchProgress, now: Sequence[str] = ()) -> list[str]:
    """The lines of the live view; `now` has one for the trial of each worker."""
    lines = [f"Search  {_left(state)}, {state.done} trials done"]
    lines += [f"now     {line}" for line in now or [_trial(state)]]
    if state.baseline_step_s is not None and state.best_step_s is not None:
        step, changed = seconds(state.best_step_s), changes(state.best_changed, state.baseline)
        lines.append(f"own     {seconds(state.baseline_step_s)} per step")
        lines.append(f"best    x {state.speedup:.2f}, {step} per step: {changed}")
    lines += [f"lost    {line}" for line in state.said[-MOST_SKIPPED:]]
    for row in state.skipped[:MOST_SKIPPED]:
        lines.append(f"skipped {row.count}: {row.why}")
    if state.step_error is not None:
        lines.append(f"models  off by {percent(state.step_error)} at the median")
    return lines


def plain_line(state: SearchProgress) -> str:
    """The same in one line."""
    own_s, error = state.baseline_step_s, state.step_error
    best = [] if own_s is None else [f"best x {state.speedup:.2f}, own {seconds(own_s)} per step"]
    models = [] if error is None else [f"models off by {percent(error)}"]
    return " | ".join([_left(state), _trial(state), *best, *models])


def _left(state: SearchProgress) -> str:
    if not state.total_s:
        return "no budget: a probe, then a prediction"
    return f"{hms(state.left_s)} of {hms(state.total_s)} left"


def _trial(state: SearchProgress) -> str:
    """The trial under way, its stage, and its changes cut to a line's end."""
    trial, progress = state.trial, state.progress
    name = f"trial {trial.number}{' (race)' if trial.source == 'race' else PURPOSES[trial.purpose]}"
    name += f" on {trial.place}" if trial.place else ""
    stage = "" if progress is None else f"; {_stage(progress)}"
    text = ", ".join(f"{key.rpartition('.')[2]} {value_text(value)}" for key, value in state.changed.items())
    if len(text) > SHORT:
        text = f"{text[: SHORT - 3]}..."
    return f"{name}: {text or 'your own configuration'}{stage}"


def _stage(progress: Progress) -> str:
    """The step of a trial and what it does there, or its phase of start-up."""
    stage = STAGE_WORDS.get(progress.stage, progress.stage)
    if not progress.step:
        return stage
    return f"step {progress.step}" if progress.stage == "other" else f"step {progress.step}, {stage}"
