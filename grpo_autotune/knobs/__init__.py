"""What a search may turn, and a configuration with knobs turned."""

from __future__ import annotations

from grpo_autotune.knobs.given import Given, given
from grpo_autotune.knobs.table import PROMPTS, TABLE, Kind, Knob, knob
from grpo_autotune.knobs.turn import Knobs, kind_of, knobs_of, partition_matters, with_knobs

__all__ = [
    "PROMPTS",
    "TABLE",
    "Given",
    "Kind",
    "Knob",
    "Knobs",
    "given",
    "kind_of",
    "knob",
    "knobs_of",
    "partition_matters",
    "with_knobs",
]
