"""Recorded logs of healthy trainings, and the same with a fault from one step on, one for each monitor of logs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.config.sections.monitors import MonitorsSection
from grpo_autotune.records.alerts import Alert
from grpo_autotune.train.monitors.rules import TREND, Run
from grpo_autotune.train.monitors.watch import Watch

LOGS = Path(__file__).parents[2] / "docs" / "benchmarks" / "monitors_logs.json.gz"
START = 31
"""First faulty step."""

Log = list[dict[str, Any]]


def healthy_logs() -> list[dict[str, Any]]:
    """The recorded runs: their settings, and under `log` their lines."""
    runs: list[dict[str, Any]] = json.loads(gzip.decompress(LOGS.read_bytes()))
    return runs


def replayed(log: Log, run: Run | None = None, monitors: MonitorsSection | None = None) -> list[Alert]:
    """The alerts of a whole log."""
    watch = Watch((monitors or MonitorsSection()).items_on(), run or Run())
    return [alert for row in log for alert in watch.see(row)]


class Fault(NamedTuple):
    """A fault: what its lines hold instead, by the steps since it began (the line before that has -1 and less)."""

    change: Callable[[dict[str, Any], int], dict[str, Any]]
    run: dict[str, Any] = {}
    evaluates: bool = True

    def of(self, log: Log) -> Log:
        """The log with the fault."""
        rows = [row for row in log if self.evaluates or row["kind"] == "train"]
        return [{**row, **self.change(row, row["step"] - START)} for row in rows]


def _train(values: Callable[[dict[str, Any], int], dict[str, Any]]) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """A change of the faulty lines of training alone."""
    return lambda row, since: values(row, since) if row["kind"] == "train" and since >= 0 else {}


def _always(faulty: dict[str, Any], before: dict[str, Any]) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    return lambda row, since: {} if row["kind"] == "eval" else faulty if since >= 0 else before


def _hacked(row: dict[str, Any], since: int) -> dict[str, Any]:
    if row["kind"] == "train":
        return {"reward": 0.9 if since >= -5 else 0.4}
    return {"eval_reward": 0.1 if since >= 0 else 0.8 if row["step"] else 0.5, "eval_reward_std": 0.1}


def _longer(row: dict[str, Any], since: int) -> dict[str, Any]:
    """Twice as long, and the reward had fallen before."""
    length = "completions/mean_length"
    return ({"reward": 0.0} if since >= -TREND else {}) | ({length: 2 * row[length]} if since >= 0 else {})


def _leak(row: dict[str, Any], since: int) -> dict[str, Any]:
    return {"memory_share": 0.96 + max(0, since + 1) * 1e-4}


FAULTS = {
    "not_finite": Fault(_train(lambda row, since: {"reward": None})),
    "loss_spike": Fault(_train(lambda row, since: {"grad_norm": 50.0 * row["grad_norm"]} if not since else {})),
    "kl_high": Fault(_train(lambda row, since: {"kl": 3.0})),
    "kl_low": Fault(_always({"branch/fair/kl": 0.001}, {"branch/fair/kl": 0.03}), {"bands": {"fair": (0.02, 0.06)}}),
    "entropy_collapse": Fault(_train(lambda row, since: {"entropy": 0.1 * row["entropy"]} if "entropy" in row else {})),
    "length_drift": Fault(_longer, evaluates=False),
    "dead_groups": Fault(_train(lambda row, since: {"frac_reward_zero_std": 0.875})),
    "truncated": Fault(_train(lambda row, since: {"completions/clipped_ratio": 0.5})),
    "reward_ceiling": Fault(_train(lambda row, since: {"reward": 0.99}), {"highest": 1.0}),
    "held_out_gap": Fault(_hacked),
    "judge_failures": Fault(_always({"rewards/judge/failed": 0.1}, {"rewards/judge/failed": 0.0})),
    "memory_creep": Fault(_leak),
    "nothing_learned": Fault(
        _train(lambda row, since: {"grad_norm": 0.0, "completions/clipped_ratio": 1.0}), {"masks": True}
    ),
}
"""Monitor -> the fault that it is for."""
