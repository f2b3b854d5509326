"""Traces read back: their events, and the seconds of each stage in them."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from grpo_autotune.report.trace import TRACE_FILE


def events_in(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(gzip.decompress((folder / TRACE_FILE).read_bytes()))["traceEvents"])


def self_seconds(events: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Seconds by step and stage, each slice less those that stand in it; fails where two overlap."""
    step = 0
    totals: dict[tuple[int, str], float] = defaultdict(float)
    open_: list[dict[str, Any]] = []
    for event in (event for event in events if event["ph"] == "X"):
        while open_ and event["ts"] >= open_[-1]["ts"] + open_[-1]["dur"]:
            open_.pop()
        step = step if open_ else int(event["name"].removeprefix("step "))
        if open_:
            assert event["ts"] + event["dur"] <= open_[-1]["ts"] + open_[-1]["dur"], "slices overlap"
            totals[step, open_[-1]["cat"]] -= event["dur"] / 1e6
        totals[step, event["cat"]] += event["dur"] / 1e6
        open_.append(event)
    return totals
