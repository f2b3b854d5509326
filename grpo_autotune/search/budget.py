"""A budget of wall-clock seconds that is kept: the rest, the part set aside, and the cost of the next trial."""

import math
import re
import statistics
import time
from collections.abc import Callable

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.trial import TrialOutcome

END_SHARE = 0.2
"""Kept for the worst-case step and the race; more where starting two processes takes more, up to `MOST_END_SHARE`."""
MOST_END_SHARE = 0.6
CLOSING_S = 2.0
"""Kept for ending the last process and writing the files; at most a tenth of the budget."""
WARM_SAVES = 0.6
"""Of start and warm-up, where the process has its libraries loaded: two thirds of what was measured on CPUs."""
STARTS = 1.5
"""Cold starts, with their steps to warm up, that two take who start side by side; of twice as many so many more."""
SURE = 1.15
"""A trial is begun where its estimate and this much more fit."""
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `30m`, `1h30m` or `0`; ConfigError for any other text."""
    plain = text.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", plain)
    if plain == "0":
        return 0.0
    if not parts or "".join(number + unit for number, unit in parts) != plain:
        fix = "Accepted: 90s, 30m, 1h30m, and 0 for a prediction."
        raise ConfigError(f"{text!r} is not a length of time", where="--budget", fix=fix)
    return sum(float(number) * UNITS[unit] for number, unit in parts)


class Budget:
    """Seconds of one search, of which its earlier processes spent `spent_s`. The clock is monotonic, since a wall clock
    may be set meanwhile; `begun` is its reading when this process began."""

    def __init__(
        self,
        total_s: float,
        spent_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        begun: float | None = None,
    ) -> None:
        self.total_s, self._spent_s, self._clock = total_s, spent_s, clock
        self._begun = clock() if begun is None else begun
        self.end_s = END_SHARE * total_s  # kept for the worst-case step and the race

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, over all processes."""
        return self._spent_s + self._clock() - self._begun

    def keep(self, *needed_s: float) -> None:
        """Keep the first of these for the end that is no more than may be kept; the plain share where it is less, or
        all are more."""
        most_s = MOST_END_SHARE * self.total_s
        self.end_s = max(END_SHARE * self.total_s, next((one for one in needed_s if one <= most_s), 0.0))

    @property
    def left_s(self) -> float:
        """Seconds until everything has to be over, those for closing taken out."""
        return self.total_s - min(CLOSING_S, 0.1 * self.total_s) - self.elapsed_s

    @property
    def search_left_s(self) -> float:
        """Seconds left for trials, with the end's share kept."""
        return self.left_s - self.end_s


class Costs:
    """Seconds of a trial beside its measured steps, learnt from those that ended well. Where trials may share a process
    (`warm`), that is taken to save `WARM_SAVES` of a start until one has."""

    def __init__(self, *, warm: bool = True) -> None:
        self._cold: list[float] = []
        self._warm: list[float] = []
        self._first_share = 1.0 - WARM_SAVES if warm else 1.0

    def learn(self, outcome: TrialOutcome) -> None:
        if outcome.status != "ok" or not outcome.step_s:
            return
        occasions_s = outcome.record.occasions_s if outcome.record else 0.0  # of a probe alone
        beside = max(0.0, outcome.elapsed_s - sum(outcome.step_s) - occasions_s)
        (self._warm if outcome.warm else self._cold).append(beside)

    @property
    def beside_s(self) -> float:
        """Start-up and warm-up of the next trial: a warm one's where there were any, and now and then a cold one's."""
        if self._warm:
            cold = max(self._cold, default=0.0)
            share = len(self._cold) / (len(self._cold) + len(self._warm))
            return statistics.median(self._warm) + share * cold
        return self._first_share * statistics.median(self._cold) if self._cold else 0.0

    @property
    def cold_s(self) -> float:
        """The same of a fresh process."""
        return max(self._cold, default=0.0)

    def starts_s(self, count: int, *, warm: bool) -> float:
        """Start-up and warm-up of several side by side; `warm` if the processes of two are there."""
        return 2.0 * self.beside_s if warm and count == 2 else STARTS ** math.log2(count) * self.cold_s

    def trial_s(self, step_s: float, steps: int) -> float:
        return self.beside_s + steps * step_s
