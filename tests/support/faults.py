"""Rewards that go wrong, each in one way, at the call that `FAULT_AT_CALL` names (the first without it)."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

_calls = 0
TOO_MUCH = 1 << 46
"""Bytes that no address space here holds."""


def _due() -> bool:
    global _calls
    _calls += 1
    return _calls == int(os.environ.get("FAULT_AT_CALL", "1"))


def _fine(completion_ids: list[list[int]]) -> list[float]:
    return [len(set(ids)) / 8 + (sum(ids) % 7) / 10 for ids in completion_ids]


def fails(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    if _due():
        raise KeyError("score")
    return _fine(completion_ids)


def asks_too_much(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    if _due():
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    return _fine(completion_ids)


def hangs(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The backward pass after it never ends, and it leaves a process behind in a session of its own, as a careless
    sandbox does."""
    if _due():
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        torch.Tensor.backward = lambda *args, **kwargs: time.sleep(600)  # type: ignore[method-assign]
    return _fine(completion_ids)


def is_killed(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    if _due():
        os.kill(os.getpid(), signal.SIGKILL)
    return _fine(completion_ids)


def fills_the_disk(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """From here on no file of this process grows beyond a hundred bytes."""
    if _due():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return _fine(completion_ids)


def model_that_asks_too_much() -> str:
    """A model function: the folder `FAULTY_MODEL`, but for memory that it cannot have."""
    torch.empty(TOO_MUCH, dtype=torch.uint8)
    return os.environ["FAULTY_MODEL"]


def remembers(completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> list[float]:
    """Writes down each call's completions and the losses so far, a line a call."""
    losses = [line["loss"] for line in trainer_state.log_history if "loss" in line]
    with Path(os.environ["REMEMBERED"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"completions": completion_ids, "losses": losses}) + "\n")
    return _fine(completion_ids)


kept: list[Any] = []


def keeps_the_trainer(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The trainer that calls it is never let go of."""
    kept.extend(found for found in gc.get_objects() if issubclass(type(found), GRPOTrainer))
    return _fine(completion_ids)
