"""Seconds as a sum of features times non-negative coefficients, and what that sum leaves, learnt by knob.

The coefficients come from non-negative least squares on relative errors (Lawson and Hanson 1974) with a prior row a
feature, so that a single observation already answers and every further one weighs more than the prior. What remains as
a factor is a Gaussian process over the knobs with one additive term a knob (Duvenaud et al. 2011, arXiv:1112.4394), so
that what was learnt about one knob holds whatever the others are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import nnls

from grpo_autotune.search.features import Features

Floats = NDArray[np.float64]
Place = Mapping[str, float | str]
"""A setting's place among others: a number (compared on a log scale) or a word (equal or not) a dimension."""

FIXED_SHARES = {"calls": 0.05, "rows": 0.05, "steps": 0.3, "calls@again": 0.02}
"""First guess, before trials tell: share of a stage's seconds that goes into occasions rather than work. Decoding has
the largest: it starts hundreds of small operations a step."""

WORK_ENDINGS = ("_flops", "_bytes", "scores")
"""Features counted in operations: before trials tell, all of them cost the same."""

NOISE = 0.03
"""Relative standard deviation of a measured stage (median of a few steps)."""

PRIOR_SPREAD = 1.0
"""Standard deviation of a coefficient around its first guess, as a share of it."""

TERM_SPREAD = 0.08
"""Standard deviation of the factor that one knob adds to what the features say."""

TERM_REACH = 1.5
"""Doublings of a number after which what was learnt about it no longer holds."""


class Solved(NamedTuple):
    """Coefficients in units of their first guess, and their covariance with the bound at zero left aside."""

    coefficients: Floats
    scatter: Floats


def solve(rows: Floats, spreads: Floats, noise: float) -> Solved:
    """Non-negative coefficients x with rows @ x near 1 and x near 1.

    Args:
        rows: An observation a row: each feature's share of what was measured, at the first guess.
        spreads: Standard deviation of each coefficient around 1.
        noise: Relative standard deviation of an observation.
    """
    system = np.vstack([rows / noise, np.diag(1.0 / spreads)])
    target = np.concatenate([np.full(len(rows), 1.0 / noise), 1.0 / spreads])
    found, _ = nnls(system, target)
    return Solved(found, np.asarray(np.linalg.inv(system.T @ system), dtype=np.float64))


@dataclass(frozen=True)
class Seen:
    """One observation: features, seconds, where it was made."""

    features: Features
    seconds: float
    place: Place


@dataclass(frozen=True)
class Estimate:
    """A mean and its relative standard deviation."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Fit:
    """Coefficients and terms fitted to observations, the first of which is the probe."""

    seen: tuple[Seen, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Features of any observation."""
        return tuple(sorted({name for one in self.seen for name in one.features}))

    @cached_property
    def prior(self) -> dict[str, float]:
        """First guess of each coefficient, from the first observation."""
        return first_guess(self.seen[0], self.names)

    @cached_property
    def coefficients(self) -> dict[str, float]:
        """Non-negative coefficients; a feature that no observation has keeps its first guess."""
        guess = np.array([self.prior[name] for name in self.names])
        return dict(zip(self.names, (self._solved.coefficients * guess).tolist(), strict=True))

    @cached_property
    def _solved(self) -> Solved:
        """Coefficients in units of their first guess."""
        guess = np.array([self.prior[name] for name in self.names])
        rows = np.array([[one.features.get(name, 0.0) / one.seconds for name in self.names] for one in self.seen])
        return solve(rows * guess, np.full(len(guess), PRIOR_SPREAD), NOISE)

    @cached_property
    def _left(self) -> Floats:
        """Logarithm of measured over summed seconds, an observation."""
        return np.array([math.log(one.seconds / max(self._sum(one.features), 1e-12)) for one in self.seen])

    @cached_property
    def _kernel(self) -> Floats:
        places = [one.place for one in self.seen]
        noise = NOISE**2 * np.eye(len(places))
        found: Floats = np.array([[likeness(a, b) for b in places] for a in places]) + noise
        return found

    def predict(self, features: Features, place: Place) -> Estimate:
        """Seconds at a setting, and how sure that is: the coefficients' scatter and the terms' variance."""
        plain = self._sum(features)
        if plain <= 0.0:
            return Estimate(0.0, 0.0)
        near = np.array([likeness(place, one.place) for one in self.seen])
        weights = np.linalg.solve(self._kernel, near)
        factor = math.exp(float(weights @ self._left))
        terms = max(0.0, likeness(place, place) - float(weights @ near))
        scaled = np.array([features.get(name, 0.0) * self.prior[name] for name in self.names]) / plain
        unseen = sum(count * self._guess(name) for name, count in features.items() if name not in self.prior) / plain
        scatter = float(scaled @ self._solved.scatter @ scaled) + (PRIOR_SPREAD * unseen) ** 2
        return Estimate(plain * factor, math.sqrt(scatter + terms + NOISE**2))

    def _sum(self, features: Features) -> float:
        return sum(count * self._guess(name) for name, count in features.items())

    def _guess(self, name: str) -> float:
        """A coefficient; for a feature that nobody has seen, its first guess."""
        if name in self.coefficients:
            return self.coefficients[name]
        return first_guess(self.seen[0], (*self.names, name))[name]


def first_guess(probe: Seen, names: Sequence[str]) -> dict[str, float]:
    """Coefficients that give the probe's seconds: fixed shares for occasions, one price for all operations, and an
    equal share for every other count."""
    fixed = {n: s for n, s in ((name, FIXED_SHARES.get(name.partition("@vllm")[0])) for name in names) if s is not None}
    rest = 1.0 - sum(share for name, share in fixed.items() if probe.features.get(name))
    work = [name for name in names if name.endswith(WORK_ENDINGS) or (name.endswith("@vllm") and name not in fixed)]
    others = [name for name in names if name not in fixed and name not in work]
    worked = sum(probe.features.get(name, 0.0) for name in work)
    present = [name for name in others if probe.features.get(name)]
    if not worked and not present:
        rest = 0.0
    shares = {name: (0.0 if worked else rest / max(1, len(present))) for name in others}
    found = {name: share * probe.seconds / max(probe.features.get(name, 0.0), 1.0) for name, share in fixed.items()}
    found |= {name: shares[name] * probe.seconds / max(probe.features.get(name, 0.0), 1.0) for name in others}
    price = rest * probe.seconds / worked if worked else 0.0
    found |= dict.fromkeys(work, price)
    if rest == 0.0 and fixed:
        told = sum(found[name] * probe.features.get(name, 0.0) for name in fixed)
        found = {name: value * (probe.seconds / told if told else 1.0) for name, value in found.items()}
    return {name: max(value, 1e-15) for name, value in found.items()}


def likeness(left: Place, right: Place) -> float:
    """Covariance of two settings' factors: one term a dimension."""
    total = 0.0
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if isinstance(a, str) or isinstance(b, str):
            total += TERM_SPREAD**2 * (a == b)
        else:
            apart = math.log2(max(a, 1e-9) / max(b, 1e-9)) / TERM_REACH
            total += TERM_SPREAD**2 * math.exp(-0.5 * apart * apart)
    return total


def wide(confidence: float, freedom: int) -> float:
    """Student's t: how many standard deviations hold a value with this confidence."""
    return float(stats.t.ppf(0.5 + confidence / 2.0, max(1, freedom)))
