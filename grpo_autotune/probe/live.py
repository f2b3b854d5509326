"""The state of a run while it goes, `live.json` in its folder, written anew about once per second."""

import math
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from grpo_autotune.console import is_first_rank
from grpo_autotune.files import write_whole
from grpo_autotune.probe.stages import APART
from grpo_autotune.records.base import Frozen
from grpo_autotune.records.search import SearchProgress

LIVE_FILE = "live.json"
EVERY_S = 1.0
LIVE_STEPS = 20


class Live(Frozen):
    """State of a run."""

    host: str  # machine of the process
    pid: int
    born_s: float  # birth of the process in Unix seconds: another one may have its number later
    stage: str = ""  # phase of start-up, or stage of the step
    step: int = 0  # optimizer step under way, or the last one where the run is over; 0 before the first
    of: int = 0  # steps of the whole run
    step_s: list[float] = []  # seconds of the latest steps
    logged: dict[str, float] = {}  # newest values, by TRL's names
    memory_bytes: float = 0.0  # on a GPU all that is in use there, else of the process
    search: SearchProgress | None = None
    over: bool = False  # True after a training, also where the process goes on, as a notebook's does


def goes_on(folder: Path) -> bool:
    """Return whether a training in the folder goes on, or was killed: a report there is an earlier one's."""
    with suppress(OSError, ValueError):
        return not Live.model_validate_json((folder / LIVE_FILE).read_bytes()).over
    return False


class LiveFile:
    """`live.json` of a run folder, of the first rank alone; `total` is the number of steps if not the trainer's."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written_s, self._memory_bytes = folder.absolute() / LIVE_FILE, -math.inf, 0.0
        self._process = {"host": socket.gethostname(), "pid": os.getpid(), "born_s": psutil.Process().create_time()}
        self.total: int | None = None

    def write(self, **state: Any) -> None:
        """Write the fields of a `Live`, given without those of the process."""
        self._written_s = time.monotonic()
        if is_first_rank():
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, Live(**self._process, **state).model_dump_json(), durable=False)

    def starting(self, phase: str) -> None:
        self.write(stage=f"start-up: {phase}")

    def see(self, state: Any, stage: str | None, step_s: list[float], sample: dict[str, float] | None) -> None:
        """Write the state of a trainer in `stage`, with a sample of the machine; without one it has ended."""
        if sample is not None:
            self._memory_bytes = sample.get("gpu_memory_bytes", sample["rss_bytes"])
            if time.monotonic() - self._written_s < EVERY_S:
                return
        rows = (item for row in state.log_history[-LIVE_STEPS:] for item in row.items())
        keys = ("reward", "kl", "eval_reward")
        logged = {key: n for key, n in rows if key in keys and isinstance(n, float) and math.isfinite(n)}
        step, of = state.global_step + (stage not in (None, APART)), self.total or state.max_steps
        over, memory = sample is None, self._memory_bytes
        self.write(stage=stage or "", step=step, of=of, step_s=step_s, logged=logged, memory_bytes=memory, over=over)
