"""How a benchmark's outcome is written: rows as measured, and ratios with their spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from grpo_autotune.hardware import detect
from grpo_autotune.probe.trainer_facts import versions

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
CONFIDENCE = 0.95


def ratio(numbers: Sequence[float]) -> dict[str, float]:
    """Median of pairwise ratios with its bootstrap interval (percentile method, 95 %), which of one is that one."""
    if len(numbers) == 1:
        return dict.fromkeys(("median", "low", "high"), float(numbers[0])) | {"n": 1}
    data, rng = (np.asarray(numbers),), np.random.default_rng(0)
    found = bootstrap(data, np.median, confidence_level=CONFIDENCE, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return {"median": statistics.median(numbers), "low": float(low), "high": float(high), "n": len(numbers)}


def write(
    name: str, command: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, Mapping[str, float]]
) -> Path:
    """Write `docs/benchmarks/<name>.json`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    outcome = {
        "name": name,
        "command": command,
        "machine": detect().model_dump(mode="json"),
        "versions": versions(),
        "rows": list(rows),
        "ratios": dict(ratios),
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(outcome, indent=2) + "\n")
    return path
