"""The input of every advice, one probe accounted for, and its output, an idea."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import Living, living_of
from grpo_autotune.predict.room import busy_share, memory_of
from grpo_autotune.probe.breakdown import Breakdown, Limit
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.report import Change, Kind
from grpo_autotune.registry import names
from grpo_autotune.scripts.stand_in import config_of_script

PASSES = ("policy_logprob", "reference_logprob", "backward")


@dataclass(frozen=True)
class Idea:
    """One advice before it is put into a sentence."""

    kind: Kind
    stages: tuple[str, ...]  # stages that get shorter, or that the advice is about
    because: str  # the derivation of the saving, in words
    changes: tuple[Change, ...] = ()  # what to set
    saving_s: float | None = None  # predicted per step; None where none is saved, or where the models cannot tell
    caveat: str = ""  # what to watch
    action: str = ""  # said in place of the changes where no key does it


@dataclass(frozen=True)
class Facts:
    """One probe, accounted for."""

    record: ProbeRecord
    breakdown: Breakdown
    limits: Mapping[str, Limit] = field(default_factory=dict)  # by stage, where they are known
    machine: Machine | None = None  # what it was measured on; None where that is not known
    config: RunConfig | None = None  # the run's; None for a trainer that somebody else built

    @cached_property
    def base(self) -> RunConfig | None:
        """The configuration that knobs are turned on: the run's own, else one made of the trainer's facts; None where
        these do not fit together in this process (another world size)."""
        if self.config is not None:
            return self.config
        nobody: dict[str, Any] = {
            "model": {"name_or_path": "script"},
            "data": {"path": "script"},
            "rewards": [{"name": "script"}],
            "speedups": [name for name in self.record.trainer.speedups if name in names("speedup")] or "none",
        }
        try:
            return config_of_script(RunConfig.from_dict(nobody), self.record)
        except ConfigError:
            return None

    @cached_property
    def models(self) -> Models | None:
        """The search's models, which know nothing but this probe; None where the probe does not tell enough."""
        if self.base is None or self.machine is None or self.record.tokens is None:
            return None
        return Models.from_probe(self.base, self.record, self.machine)

    @cached_property
    def living(self) -> Living | None:
        """Share of groups whose rewards differ, by group size; None where no spread of rewards was seen."""
        return living_of(self.record)

    @property
    def grpo(self) -> Mapping[str, Any]:
        """The configuration's `grpo` section; empty without a configuration."""
        return self.config.grpo if self.config is not None else {}

    @property
    def on_gpu(self) -> bool:
        return self.record.trainer.device.startswith("cuda")

    def part_s(self, stage: str, part: str) -> float:
        return self.breakdown.parts_s.get((stage, part), 0.0)

    def peak_bytes(self) -> int | None:
        return max((row.peak_bytes for row in self.record.timings.stages if row.peak_bytes), default=None)

    def memory_bytes(self) -> int | None:
        return memory_of(self.machine, self.record.trainer) if self.machine is not None else None

    def busy_share(self, *stages: str) -> float | None:
        """Share of the time in which the device works while these stages run, 0 to 1."""
        return busy_share(self.record, self.machine, *stages) if self.machine is not None else None

    def dead_share(self) -> float | None:
        """Share of groups without reward spread; None where no group was seen."""
        tokens = self.record.tokens
        return tokens.dead_groups / tokens.groups if tokens and tokens.groups else None
