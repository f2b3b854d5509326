"""The peak of memory: what the formula counts, weighted by what was measured on this machine.

A CUDA allocator serves one phase from what another has freed, so the peak is the largest phase. The C library's heap is
left full of holes that later phases do not fit into, so that on a CPU what each phase took adds up (measured on a model
of 14 million parameters: the formula's largest phase explains 12 settings to 15 %, the sum to 5 %). The weights are
non-negative least squares around a first guess, as for seconds.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from grpo_autotune.estimate.memory import memory
from grpo_autotune.predict.regression import Estimate, Floats, Solved, solve
from grpo_autotune.predict.workload import Workload

NOISE = 0.05
"""Relative standard deviation of a measured increment."""

HOST = {
    "stays": Estimate(1.0, 0.3), "images": Estimate(1.0, 0.5), "pixels": Estimate(2.0, 0.6),
    "generation": Estimate(0.7, 0.7), "activations": Estimate(0.7, 0.6), "head": Estimate(3.0, 1.3),
    "engine": Estimate(1.0, 0.3), "shift": Estimate(0.25, 1.0),
}  # fmt: skip
"""First guesses of the weights on a CPU. `shift` is what libraries load and keep beside the model, as a share of the
first increment measured."""

DEVICE = {"peak": Estimate(1.0, 0.3), "shift": Estimate(0.05, 2.0)}
"""On a GPU."""


class PeakObservation(NamedTuple):
    """One trial's memory; `at_least`: it ran out, so that it would have taken more."""

    load: Workload
    increment: float
    idle: float
    at_least: bool


@dataclass(frozen=True)
class PeakFit:
    """Weights of the formula's components that fit the trials."""

    seen: tuple[PeakObservation, ...]

    @cached_property
    def _known(self) -> list[PeakObservation]:
        return [one for one in self.seen if not one.at_least]

    @cached_property
    def _unit(self) -> float:
        """The first increment measured: what `shift` is a share of."""
        return self._known[0].increment if self._known else 0.0

    @cached_property
    def _solved(self) -> Solved:
        columns = [self._columns(one.load) / one.increment for one in self._known]
        guesses = guesses_of(self.seen[0].load)
        rows = np.array(columns) if columns else np.zeros((0, len(guesses)))
        return solve(rows, np.array([guess.spread for guess in guesses.values()]), NOISE)

    def _columns(self, load: Workload) -> Floats:
        """Bytes of each component at the first guess of its weight."""
        parts = {**components(load), "shift": self._unit}
        return np.array([parts[name] * guess.mean for name, guess in guesses_of(load).items()])

    @cached_property
    def idle(self) -> float:
        """Bytes of the idle process; 0 before any trial."""
        return statistics.median([one.idle for one in self.seen] or [0.0])

    def predict(self, load: Workload) -> Estimate:
        """Bytes beyond idle that a load needs; at least those of one that by formula needs less, and ran out."""
        if not self.seen:
            return Estimate(increment(load), 1.0)
        columns = self._columns(load)
        bytes_ = float(columns @ self._solved.coefficients)
        for one in self.seen:
            below = float(self._columns(one.load) @ self._solved.coefficients)
            if one.at_least and bytes_ >= below:
                bytes_ = max(bytes_, one.increment * bytes_ / max(below, 1.0))
        shares = columns / max(bytes_, 1.0)
        spread = math.sqrt(float(shares @ self._solved.scatter @ shares) + NOISE**2)
        return Estimate(bytes_, spread)


def guesses_of(load: Workload) -> dict[str, Estimate]:
    """The components of this device's peak."""
    return DEVICE if load.trainer.device.startswith("cuda") else HOST


def components(load: Workload) -> dict[str, float]:
    """Bytes by component; for an architecture without formulas, of its weights and what trains alone."""
    if load.shape is None:
        return dict.fromkeys(HOST, 0.0) | {"stays": increment(load), "peak": increment(load)}
    parts = memory(load.shape, load.facts, load.sizes)
    return {
        "stays": parts.weights + parts.moments + parts.gradients + parts.features,
        "images": parts.images,
        "pixels": parts.pixels,
        "generation": parts.prefill + parts.cache + (parts.copies if load.sizes.gathers_all else 0.0),
        "activations": parts.activations + parts.backward + parts.gathered,
        "head": parts.head,
        "engine": parts.engine,
        "peak": parts.peak,
    }


def increment(load: Workload) -> float:
    """The formula's bytes beyond an idle process."""
    if load.shape is None:
        training = load.facts.training
        return float(
            load.trainer.parameters * training.weight_bytes + training.trainable * 4 * training.trainable_bytes
        )
    return memory(load.shape, load.facts, load.sizes).peak
