"""Tuned files as a search writes them, without a search."""

from __future__ import annotations

from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs.apply import with_knobs
from grpo_autotune.knobs.table import knob


def tuned_values(config: dict[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    """The values of the file that a search writes for these knobs, found on as many processes as `WORLD_SIZE` says."""
    before = RunConfig.from_dict(config)
    after = with_knobs(before, knobs)
    kept = {key: knob(key).current(before) for key in knobs}
    changed = [
        {"key": key, "before": kept[key], "after": value, "kind": "exact", "proof": "exact"}
        for key, value in knobs.items()
        if value != kept[key]
    ]
    receipt = {
        "machine": "m", "hardware": "2 cores of a CPU", "versions": {"trl": "1.16.0"}, "step_s": 1.0, "step_s_low": 0.9,
        "step_s_high": 1.1, "steps": 8, "baseline_step_s": 2.0, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1,
        "raced": True, "confidence": 0.95, "changed": changed,
    }  # fmt: skip
    return {**after.to_dict(), "receipt": receipt}
