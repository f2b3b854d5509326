"""Ranks tell each other their means through the process group's key-value store.

No collective is used: a rank that has no probe, or left early, is missing from the table and keeps nobody waiting.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from grpo_autotune.records.probe import RankTimings

WAIT_S = 10.0
POLL_S = 0.05


def publish(mine: RankTimings, topic: str) -> None:
    """Let the other ranks read this one's means; does nothing without a process group."""
    store = _store()
    if store is not None:
        store.set(f"{topic}/{mine.rank}", mine.model_dump_json())


def collect(topic: str, ranks: int, wait_s: float = WAIT_S) -> list[RankTimings]:
    """What the ranks published, in their order, after waiting at most `wait_s` for the slowest."""
    store = _store()
    if store is None:
        return []
    deadline = time.monotonic() + wait_s
    names = [f"{topic}/{rank}" for rank in range(ranks)]
    while not store.check(names) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    there = [name for name in names if store.check([name])]
    return [RankTimings.model_validate_json(store.get(name)) for name in there]


def _store() -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()
