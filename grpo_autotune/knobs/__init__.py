"""Knobs, the settings that a search may change: their values and rules, and a configuration with them applied."""

from grpo_autotune.knobs.apply import Knobs, kind_of, knobs_of, with_knobs
from grpo_autotune.knobs.context import KnobContext, context_of
from grpo_autotune.knobs.table import PROMPTS, TABLE, Kind, knob

__all__ = [
    "PROMPTS", "TABLE", "Kind", "KnobContext", "Knobs", "context_of", "kind_of", "knob", "knobs_of", "with_knobs",
]  # fmt: skip
