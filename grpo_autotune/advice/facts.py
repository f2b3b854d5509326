"""What a rule may look at, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_autotune.advice.breakdown import Breakdown, Limit
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.report import Change, Kind

PASSES = ("policy_logprob", "reference_logprob", "backward")
HEADROOM = 0.9
"""Share of the device's memory that an advice may fill: the rest is left to fragmentation and to longer completions."""


@dataclass(frozen=True)
class Idea:
    """What a rule answers: `because` derives the saving in words, `caveat` says what to watch.

    `action` is said in place of the changes where no key does it.
    """

    kind: Kind
    stages: tuple[str, ...]
    because: str
    changes: tuple[Change, ...] = ()
    saving_s: float | None = None
    caveat: str = ""
    action: str = ""


@dataclass(frozen=True)
class Facts:
    """One probe, accounted for.

    Attributes:
        record: What was measured.
        breakdown: Seconds by stage.
        limits: Stage to its share of the machine's ceiling, where it is known.
        machine: `Machine` as JSON, null where it is not known.
        config: The run's configuration as a dict, null for a trainer somebody else built.
    """

    record: ProbeRecord
    breakdown: Breakdown
    limits: Mapping[str, Limit] = field(default_factory=dict)
    machine: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration file, null where it is not set or there is no file."""
        return ((self.config or {}).get(section) or {}).get(key)

    @property
    def on_gpu(self) -> bool:
        """Whether the trainer's model is on a CUDA device."""
        return self.record.trainer.device.startswith("cuda")

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the model's dtype."""
        return 4 if self.record.trainer.dtype.endswith("32") else 2

    def part_s(self, stage: str, part: str) -> float:
        """Seconds of a step that a part of a stage takes."""
        return self.breakdown.parts_s.get((stage, part), 0.0)

    def peak_bytes(self) -> int | None:
        """Most memory any stage took."""
        return max((row.peak_bytes for row in self.record.timings.stages if row.peak_bytes), default=None)

    def memory_bytes(self) -> int | None:
        """Memory that one rank may use: its GPU's, or its share of the machine's."""
        machine = self.machine or {}
        if self.on_gpu:
            gpus = machine.get("gpus") or []
            return int(gpus[0]["memory_bytes"]) if gpus else None
        total = machine.get("memory_bytes")
        return int(total) // self.record.trainer.world_size if total else None

    def free_bytes(self) -> int | None:
        """Memory that is left at the peak, less the headroom; null where it is not known."""
        total, peak = self.memory_bytes(), self.peak_bytes()
        return None if total is None or peak is None else int(HEADROOM * total) - peak

    def busy_share(self, *stages: str) -> float | None:
        """How busy the device is while these stages run, 0 to 1: the GPU, or this rank's part of the cores."""
        rows = [row for row in self.record.utilisation if row.stage in stages]
        cores = ((self.machine or {}).get("cores") or 0) / self.record.trainer.world_size
        if self.on_gpu:
            seen = [(row.samples, row.gpu_percent / 100.0) for row in rows if row.gpu_percent is not None]
        else:
            seen = [
                (row.samples, row.cpu_percent / 100.0 / cores) for row in rows if cores and row.cpu_percent is not None
            ]
        weight = sum(samples for samples, _ in seen)
        return min(1.0, sum(samples * share for samples, share in seen) / weight) if weight else None

    def dead_share(self) -> float | None:
        """Share of groups without reward spread; null where no group was seen."""
        tokens = self.record.tokens
        return tokens.dead_groups / tokens.groups if tokens and tokens.groups else None

    def groups_per_step(self) -> float:
        """Groups generated an optimizer step, over all ranks: a generation batch serves
        `steps_per_generation * num_iterations` micro steps, of which a step takes `gradient_accumulation_steps`."""
        t = self.record.trainer
        per_batch = t.generation_batch_size / t.num_generations
        return per_batch * t.gradient_accumulation_steps / (t.steps_per_generation * t.num_iterations)
