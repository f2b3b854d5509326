"""Processes that train together on this machine's CPU: what every test of sharding starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from grpo_autotune.processes.fresh import free_port

ROOT = Path(__file__).parents[1]


def launch(
    *words: str, processes: int = 2, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m WORDS` (a module and its arguments) on so many processes over gloo, with DeepSpeed's accelerator for
    CPUs; their output as text. `env` is added to this process's environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return started([*command, "--master_port", str(free_port()), "-m", *words], env=env, cwd=cwd)


def started(
    command: list[str], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A command of another launcher, in the environment that `launch` gives."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests" / "env"), os.environ.get("PYTHONPATH"))))
    given = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths, **(env or {})}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)
