"""What a search may turn, and a configuration with knobs turned."""

from __future__ import annotations

from grpo_autotune.knobs.apply import Knobs, kind_of, knobs_of, with_knobs
from grpo_autotune.knobs.context import Given, given
from grpo_autotune.knobs.table import PROMPTS, TABLE, Kind, knob

__all__ = [
    "PROMPTS",
    "TABLE",
    "Given",
    "Kind",
    "Knobs",
    "given",
    "kind_of",
    "knob",
    "knobs_of",
    "with_knobs",
]
