"""What the tests of trials share: small specs, and a count of the processes that a test has left."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from grpo_autotune.records.trial import TrialSpec
from tests.support.training import text_config

MARK = "GRPO_AUTOTUNE_TEST_MARK"


def spec_of(
    model: Path, folder: Path, number: int = 0, reward: str = "tests.support.training:uneven", **spec: Any
) -> TrialSpec:
    """Two steps after one of warm-up on a text model; `grpo`, `data` and everything of `TrialSpec` may be given."""
    grpo, data = spec.pop("grpo", {}), spec.pop("data", {})
    config = text_config(model, folder, {"rewards": [{"name": reward}], "data": data}, **grpo)
    return TrialSpec.model_validate({"number": number, "config": config.to_dict(), "steps": 2, **spec})


@contextmanager
def marked(monkeypatch: Any) -> Iterator[str]:
    """Every process started meanwhile carries a mark in its environment."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        yield mark
    finally:
        monkeypatch.delenv(MARK)


def processes(mark: str) -> list[int]:
    """Living processes with the mark, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if alive and process.pid != os.getpid():
            found.append(process.pid)
    return found


def wait_until_none(mark: str, limit_s: float = 60.0) -> list[int]:
    """Processes with the mark that are there at the end of the limit."""
    deadline = time.monotonic() + limit_s
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
