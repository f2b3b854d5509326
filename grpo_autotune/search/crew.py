"""The workers of a search: each has one trial at a time, on its part of the machine.

One thread resumes all trials in turn, so that leaderboard, models and study change in one place and one at a time.
"""

from collections.abc import Callable

from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.evaluator import Evaluator, Order
from grpo_autotune.search.trial_log import LOOK_S, Trial


class Crew:
    """The workers, by their places; a single one has the whole machine, which is None. `wait` sleeps for so long."""

    def __init__(self, evaluator: Evaluator, wait: Callable[[float], None]) -> None:
        self._evaluator, self._wait = evaluator, wait
        self._places: list[str | None] = [place.name for place in evaluator.log.task.places] or [None]
        self._busy: dict[str | None, tuple[Order, Trial]] = {}
        self._ended: list[tuple[Order, TrialOutcome]] = []

    @property
    def idle(self) -> list[str | None]:
        """Places whose workers have no trial; none as long as an outcome was not taken, from which the next follows."""
        return [place for place in self._places if place not in self._busy and not self._ended]

    @property
    def is_busy(self) -> bool:
        """True while a trial is under way, or its outcome was not taken."""
        return bool(self._busy or self._ended)

    def give(self, order: Order) -> None:
        """Begin a trial on its place; without one it is run to its end."""
        self._busy[order.spec.place] = order, self._evaluator.start(order)
        self._resume(order.spec.place)

    def next_ended(self) -> tuple[Order, TrialOutcome]:
        """Wait for a trial that ends."""
        while not self._ended:
            for place in list(self._busy):
                self._resume(place)
            if not self._ended:
                self._wait(LOOK_S)
        return self._ended.pop(0)

    def leave_out(self, place: str | None) -> bool:
        """Take a worker away; False where it was the last."""
        self._places.remove(place)
        return bool(self._places)

    def give_up(self) -> None:
        """End every trial that is under way, and give its combination back."""
        for order, trial in self._busy.values():
            trial.close()
            self._evaluator.give_up(order)
        self._busy.clear()

    def _resume(self, place: str | None) -> None:
        order, trial = self._busy[place]
        try:
            next(trial)
        except StopIteration as end:
            del self._busy[place]
            self._ended.append((order, end.value))
