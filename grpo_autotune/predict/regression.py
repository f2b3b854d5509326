"""Seconds as a sum of features times non-negative coefficients, and what that sum leaves, learnt by knob.

The coefficients come from non-negative least squares on relative errors (Lawson and Hanson 1974) with one prior row
per feature, so that a single observation already answers and every further one weighs more than the prior. What
remains as a factor is a Gaussian process over the knobs with one additive term per knob (Duvenaud et al. 2011,
arXiv:1112.4394), so that what was learnt about one knob holds whatever the others are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import stdtrit

from grpo_autotune.predict.features import SPARED, Features

Floats = NDArray[np.float64]

OCCASION_SHARES = {"calls": 0.05, "rows": 0.05, "steps": 0.3, "calls_again": 0.02}
"""First guess, before trials tell: share of a stage's seconds that goes into occasions rather than work. Decoding has
the largest: it starts hundreds of small operations per step. On a GPU the probe's kernels tell (`Observation.idle`)."""

MOST_IDLE = 0.8
"""Share of a stage at most that goes into launches by the first guess."""

WORK_ENDINGS = ("_flops", "_bytes", "_scores", SPARED)
"""Features counted in operations: before trials tell, all of them cost the same, but for those that are spared."""

SPARED_SHARE = 0.1
"""First guess of what an operation costs that a speed-up leaves out, as a share of others' price: such a pass has more
to prepare, and not every pass can share."""

NOISE = 0.04
"""Relative standard deviation of a measured stage (median of a few steps)."""

PRIOR_SPREAD = 1.0
"""Standard deviation of a coefficient around its first guess, as a share of it."""

TERM_SPREAD = 0.05
"""Standard deviation of the factor that one knob adds to what the features say."""

TERM_REACH = 1.5
"""Doublings of a number after which what was learnt about it no longer holds."""

STRANGE_SPREAD = 0.5
"""Relative standard deviation of seconds under speed-ups that no trial had yet."""

LEAST = 1e-15


class Place(NamedTuple):
    """Place of a setting among others: numbers as logarithms to base 2, words for what no formula describes; the last
    is the loader's workers."""

    numbers: tuple[float, ...]
    words: tuple[str, ...]

    def of(self, part: str) -> "Place":
        """The place as it matters to a part of a step: workers make the loading shorter and nothing else."""
        return self if part == "data" else Place(self.numbers, self.words[:-1])


class Observation(NamedTuple):
    """One observation: features, seconds, where it was made."""

    features: Features
    seconds: float
    place: Place
    idle: float | None = None  # share of the seconds in which a GPU waited for the host; None where nobody looked


class Estimate(NamedTuple):
    """A mean and its relative standard deviation: of seconds, of bytes, or of a weight before anything is measured."""

    mean: float
    spread: float


class Solved(NamedTuple):
    """Coefficients in units of their first guess, and their covariance with the bound at zero left aside."""

    coefficients: Floats
    scatter: Floats


def solve(rows: Floats, spreads: Floats, noise: float) -> Solved:
    """Non-negative coefficients x with rows @ x near 1 and x near 1. An observation is a row: each feature's share of
    what was measured, at the first guess; its relative standard deviation is `noise`, those of x around 1 `spreads`."""
    system = np.vstack([rows / noise, np.diag(1.0 / spreads)])
    target = np.concatenate([np.full(len(rows), 1.0 / noise), 1.0 / spreads])
    coefficients, _ = nnls(system, target)
    return Solved(coefficients, np.asarray(np.linalg.inv(system.T @ system), dtype=np.float64))


@dataclass(frozen=True)
class Fit:
    """Coefficients and terms fitted to observations."""

    seen: tuple[Observation, ...]  # the first sets the first guess
    base: "Fit | None" = None  # a fit to draw the first guess from: the same stage under other speed-ups

    def predict(self, features: Features, place: Place) -> Estimate:
        """Seconds at a setting, and how sure that is: the coefficients' scatter and the terms' variance."""
        shares = {name: count * self._coefficient(name) for name, count in features.items()}
        plain = math.fsum(shares.values())
        if plain <= 0.0:
            return Estimate(0.0, 0.0)
        near = likeness(place, self._numbers, self._words)
        factor = math.exp(float(near @ self._pulls))
        terms = max(0.0, _most(place) - float(near @ self._inverse @ near))
        known = np.array([features.get(name, 0.0) * self._guesses[name] for name in self.names]) / plain
        unseen = math.fsum(share for name, share in shares.items() if name not in self._guesses) / plain
        scatter = float(known @ self._solved.scatter @ known) + (PRIOR_SPREAD * unseen) ** 2
        return Estimate(plain * factor, math.sqrt(scatter + terms + NOISE**2))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({name for one in self.seen for name in one.features}))

    @cached_property
    def coefficients(self) -> dict[str, float]:
        """Seconds per unit of each feature."""
        return {
            name: float(x) * self._guesses[name] for name, x in zip(self.names, self._solved.coefficients, strict=True)
        }

    def _coefficient(self, name: str) -> float:
        """Of a feature that no observation has: the first guess."""
        return self.coefficients[name] if name in self._guesses else self._first_guess((*self.names, name))[name]

    @cached_property
    def _guesses(self) -> dict[str, float]:
        return self._first_guess(self.names)

    def _first_guess(self, names: Sequence[str]) -> dict[str, float]:
        probe = self.seen[0]
        if self.base is None:
            return first_guess(probe, names)
        told = {name: self.base._coefficient(name) for name in names}
        whole = math.fsum(told[name] * probe.features.get(name, 0.0) for name in names)
        scale = probe.seconds / whole if whole > 0.0 else 1.0
        return {name: max(value * scale, LEAST) for name, value in told.items()}

    @cached_property
    def _solved(self) -> Solved:
        guess = np.array([self._guesses[name] for name in self.names])
        rows = np.array([[one.features.get(name, 0.0) / one.seconds for name in self.names] for one in self.seen])
        return solve(rows * guess, np.full(len(guess), PRIOR_SPREAD), NOISE)

    @cached_property
    def _numbers(self) -> Floats:
        return np.array([one.place.numbers for one in self.seen])

    @cached_property
    def _words(self) -> NDArray[np.str_]:
        return np.array([one.place.words for one in self.seen])

    @cached_property
    def _inverse(self) -> Floats:
        rows = [likeness(one.place, self._numbers, self._words) for one in self.seen]
        return np.asarray(np.linalg.inv(np.array(rows) + NOISE**2 * np.eye(len(rows))), dtype=np.float64)

    @cached_property
    def _pulls(self) -> Floats:
        """Contribution of each observation to the logarithm of the factor, where the likeness to it is one."""
        sums = [math.fsum(count * self.coefficients[name] for name, count in one.features.items()) for one in self.seen]
        left = [math.log(one.seconds / max(plain, LEAST)) for one, plain in zip(self.seen, sums, strict=True)]
        return np.asarray(self._inverse @ np.array(left), dtype=np.float64)


def first_guess(probe: Observation, names: Sequence[str]) -> dict[str, float]:
    """Coefficients that give the probe's seconds: fixed shares for occasions, one price for all operations, and an
    equal share for every other count. What the probe does not have costs what the nearest feature costs there:
    `steps@vllm` what `steps` do; nothing where there is none."""
    counts = {name: count for name, count in probe.features.items() if count > 0.0}
    shares = {name: OCCASION_SHARES[kind] for name in counts if (kind := name.partition("@")[0]) in OCCASION_SHARES}
    launches = next((name for kind in ("steps", "calls") for name in shares if name.partition("@")[0] == kind), None)
    if probe.idle is not None and launches is not None:
        shares[launches] = max(min(probe.idle, MOST_IDLE), OCCASION_SHARES["calls"])
    worked = math.fsum(count * _weight(name) for name, count in counts.items() if is_work(name))
    others = [name for name in counts if name not in shares and not is_work(name)]
    if not worked and not others:
        whole = max(math.fsum(shares.values()), LEAST)
        shares = {name: share / whole for name, share in shares.items()}
    rest = 1.0 - math.fsum(shares.values())
    shares |= {name: 0.0 if worked else rest / len(others) for name in others}
    known = {name: share * probe.seconds / counts[name] for name, share in shares.items()}
    price = rest * probe.seconds / worked if worked else 0.0
    guesses = {
        name: price * _weight(name) if is_work(name) else known.get(name, known.get(like(name), 0.0)) for name in names
    }
    return {name: max(guess, LEAST) for name, guess in guesses.items()}


def like(name: str) -> str:
    """The feature that stands in for one that the probe does not have."""
    plain = name.partition("@")[0]
    return "calls" if plain == "calls_again" else plain


def is_work(name: str) -> bool:
    """Return whether a feature is counted in operations."""
    return name.partition("@")[0].endswith(WORK_ENDINGS)


def _weight(name: str) -> float:
    return SPARED_SHARE if name.partition("@")[0].endswith(SPARED) else 1.0


def likeness(place: Place, numbers: Floats, words: NDArray[np.str_]) -> Floats:
    """Covariance of a setting's factor with each of the others': one term per dimension."""
    apart = (numbers - np.array(place.numbers)) / TERM_REACH
    terms = np.exp(-0.5 * apart**2).sum(axis=1) + (words == np.array(place.words)).sum(axis=1)
    return np.asarray(TERM_SPREAD**2 * terms, dtype=np.float64)


def _most(place: Place) -> float:
    return TERM_SPREAD**2 * (len(place.numbers) + len(place.words))


def wide(confidence: float, freedom: int) -> float:
    """Student's t: how many standard deviations hold a value with this confidence."""
    return float(stdtrit(max(1, freedom), 0.5 + confidence / 2.0))
