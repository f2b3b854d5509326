"""The ranks' mean timings, exchanged through the process group's key-value store.

No collective is used: a rank that has no probe, or left early, is missing from the result and blocks no other rank.
"""

import time
from typing import Any

import torch.distributed as dist

from grpo_autotune.records.probe import RankTimings

WAIT_S = 10.0
POLL_S = 0.05


def publish(mine: RankTimings, topic: str) -> None:
    """Make this rank's means readable by the others; does nothing without a process group."""
    store = _store()
    if store is not None:
        store.set(f"{topic}/{mine.rank}", mine.model_dump_json())


def collect(topic: str, ranks: int) -> list[RankTimings]:
    """Return the published means by rank, after waiting at most `WAIT_S` for the slowest."""
    store = _store()
    if store is None:
        return []
    deadline = time.monotonic() + WAIT_S
    names = [f"{topic}/{rank}" for rank in range(ranks)]
    while not store.check(names) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return [RankTimings.model_validate_json(store.get(name)) for name in names if store.check([name])]


def _store() -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()
