"""Two gloo processes: one calls while the other waits for it in a collective; both begin anew and meet again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_autotune.processes.fresh import free_port

ROOT = Path(__file__).parents[2]

RANK = """
import os, sys
import torch
import torch.distributed as dist

rank, environment = os.environ["RANK"], dict(os.environ)
dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
os.write(1, f"{sys.argv[1:]} rank {rank}: {int(number)} ranks\\n".encode())  # in one piece: ranks share the output
if "--again" not in sys.argv:
    from grpo_autotune.processes.fresh import start_anew
    from grpo_autotune.train.runs.leaving import Ranks

    ranks = Ranks(lambda meeting: start_anew(["--again"], {**environment, **meeting}))
    if rank == "1":
        assert ranks.claim()
        ranks.call()
        ranks.wait()
    try:
        dist.all_reduce(number)  # nobody joins it: it waits, or ends with one that left before
    finally:
        ranks.close()
    raise SystemExit("a rank went on alone")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_begin_anew_together(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    port = str(free_port())
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [f"{words} rank {rank}: 2 ranks" for words in ([], ["--again"]) for rank in range(2)]
    assert sorted(done.stdout.splitlines()) == sorted(told)
