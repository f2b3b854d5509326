"""Two gloo processes: one calls while the other waits for it in a collective; both begin anew and meet again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RANK = """
import os, sys
import torch
import torch.distributed as dist
from grpo_autotune.processes.fresh import start_anew
from grpo_autotune.train.runs.leaving import Ranks

rank, environment = int(os.environ["RANK"]), dict(os.environ)
rung = sys.argv.count("--again") + sys.argv.count("--resume")
dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
print(f"rank {rank} rung {rung}: {int(number)} ranks at port {os.environ['MASTER_PORT']}", flush=True)
if rung < 2:
    option = ["--again", "--resume"][rung]
    ranks = Ranks(lambda meeting: start_anew([option], {**environment, **meeting}))
    if rank == 1 - rung:  # each is once the one that runs out
        assert ranks.claim()
        ranks.call()
        ranks.wait()
    dist.all_reduce(number)  # nobody joins it
    raise SystemExit("a rank went on alone")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True, False])
def test_two_processes_begin_anew_together(launched: bool, tmp_path: Path) -> None:
    """The store is torchrun's at first, then rank 0's; without torchrun always rank 0's."""
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if launched:
        commands = [["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, str(script)]]
    else:
        commands = [[str(script)], [str(script)]]
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, *words], env={"RANK": str(rank)} | environment if launched else
                         environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank, words in enumerate(commands)
    ]  # fmt: skip
    told = [line.partition(" at port ") for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * len(processes)
    assert sorted(line for line, _, _ in told) == [
        f"rank {rank} rung {rung}: 2 ranks" for rank in range(2) for rung in range(3)
    ]
    assert len({at for _, _, at in told}) == 3  # both at the same one, which is another one each time
