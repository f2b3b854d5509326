"""One rank's part of the machine: its memory, the chance that a configuration fits into it, how busy its device is."""

import math
from typing import Protocol

from scipy.special import ndtr

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import gpu_bytes
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.probe import ProbeRecord, TrainerFacts

MEMORY_SHARE = 0.95
"""Of the memory, what is planned for: the models predict what tensors need, and an allocator takes more than that."""
LEAST_CHANCE = 0.75
"""Of fitting into the memory: what is less likely to is neither run nor advised until the models are surer of it."""
LEAST_SIGMA = 0.02
"""Standard deviation of a predicted logarithm at least: what a median of a few steps itself is unsure of."""
Z_90 = 1.645
"""Standard deviations to either end of the models' interval, which covers 90 %."""


class PeakModel(Protocol):
    """The part of the models that predicts memory."""

    def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Interval: ...


def memory_of(machine: Machine, trainer: TrainerFacts) -> int | None:
    """Bytes that one rank may take: of its GPU what other processes leave, or its share of the machine's."""
    if trainer.device.startswith("cuda"):
        return trainer.device_room_bytes or gpu_bytes(machine, trainer)
    return machine.memory_bytes // trainer.world_size


def fits(models: PeakModel, config: RunConfig, memory_bytes: int | None) -> bool:
    """True where the worst case fits into the memory with enough certainty to be run or advised."""
    return chance_to_fit(models, config, memory_bytes) >= LEAST_CHANCE


def chance_to_fit(models: PeakModel, config: RunConfig, memory_bytes: int | None) -> float:
    """Probability that the worst case stays within `MEMORY_SHARE` of the memory, its peak taken as log-normal with the
    models' interval; weighs a gain as in Gardner et al. 2014, "Bayesian optimization with inequality constraints"."""
    if memory_bytes is None:
        return 1.0
    peak = models.peak_bytes(config, worst_case=True)
    sigma = max(LEAST_SIGMA, math.log(peak.high / max(peak.value, 1.0)) / Z_90)
    return float(ndtr(math.log(max(MEMORY_SHARE * memory_bytes, 1.0) / max(peak.value, 1.0)) / sigma))


def busy_share(record: ProbeRecord, machine: Machine, *stages: str) -> float | None:
    """Share of the time in which the device works while these stages run, 0 to 1: a GPU by its kernels (NVML counts
    every window in which one ran), else the rank's part of the cores; None where nobody looked."""
    if record.trainer.device.startswith("cuda"):
        return record.profiled.busy_share(*stages) if record.profiled is not None else None
    cores = machine.cores / record.trainer.world_size
    rows = [row for row in record.utilisation if row.stage in stages]
    seen = [(row.samples, row.cpu_percent / 100.0 / cores) for row in rows if row.cpu_percent is not None]
    samples = sum(count for count, _ in seen)
    return min(1.0, sum(count * share for count, share in seen) / samples) if samples else None
