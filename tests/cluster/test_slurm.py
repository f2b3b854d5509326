"""The scripts of `examples/slurm` on a real Slurm of two nodes: stopped, preempted, requeued, and the same losses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_autotune.runs.checkpoints import survey
from tests.support import slurm
from tests.support.slurm import Slurm
from tests.support.training import log_lines, text_config

ROOT = Path(__file__).parents[2]
ON_A_CPU = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1"]
"""What `sbatch` is told beside a script: one process on each node."""

LATE = """
import time
from tests.support.training import uneven

def late(completion_ids, **columns):
    time.sleep(0.7)
    return uneven(completion_ids)
"""
"""A reward that waits, so that a signal comes in the middle of a run."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(slurm.wanting() is not None, reason=str(slurm.wanting())),
]


@contextmanager
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, proctrack: str) -> Iterator[Slurm]:
    """A Slurm whose jobs see this checkout, this Python and the reward."""
    (folder / "late_rewards.py").write_text(LATE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'env'}:{folder}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(folder)
    with slurm.slurm(folder / "slurm", proctrack=proctrack) as own:
        yield own


def steps(run: Path) -> int:
    return len(log_lines(run)) if (run / "train_log.jsonl").exists() else 0


@pytest.mark.parametrize(
    ("script", "proctrack", "codes"),
    [
        ("train.sh", "proctrack/linuxproc", (138, 143)),  # signals reach every process of a step
        ("train_torchrun.sh", "proctrack/pgid", (1, 1)),  # or those alone that Slurm has started itself
    ],
)
def test_training_on_two_nodes(
    script: str,
    proctrack: str,
    codes: tuple[int, int],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"rewards": [{"name": "late_rewards:late"}]}
    config = text_config(tiny("qwen3"), tmp_path, changes, max_steps=8, save_steps=100)
    (tmp_path / "grpo.yaml").write_text(config.to_yaml(), encoding="utf-8")

    with cluster(tmp_path, monkeypatch, proctrack) as own:

        def begin(name: str) -> tuple[str, Path, Path]:
            output, place = tmp_path / f"{name}.txt", str(ROOT / "examples" / "slurm" / script)
            return own.submit(*ON_A_CPU, place, "grpo.yaml", name, output=output), tmp_path / name, output

        number, whole, output = begin("whole")
        assert own.ended(number)["JobState"] == "COMPLETED", output.read_text()
        assert steps(whole) == 8

        for name, code in zip(("limit", "preempted"), codes, strict=True):
            number, run, output = begin(name)
            own.until(lambda run=run: steps(run) >= 2)
            if name == "limit":
                own.ask("scancel", "--signal=USR1", number)  # as --signal=USR1@120 does ahead of the limit
            else:
                urgent = ["--partition=high", "--nodes=2", "--exclusive", "--wrap=srun true"]
                assert own.ended(own.submit(*urgent, output=tmp_path / "urgent.txt"))["JobState"] == "COMPLETED"
            own.until(lambda number=number: own.job(number)["Restarts"] == "1")
            saved = survey(run / "checkpoints")
            assert [(checkpoint.step, checkpoint.flaw) for checkpoint in saved] == [(steps(run), None)]
            assert 2 <= steps(run) < 8, "it had ended before it was stopped"
            assert own.ended(number)["JobState"] == "COMPLETED", output.read_text()
            said = output.read_text()
            # torchrun's agent may abort on its way out ("terminate called without an active exception")
            assert said.count(f"Exited with exit code {code}") + said.count(": Aborted") == 2, said
            assert f"resuming at step {saved[0].step}" in said
            assert log_lines(run) == log_lines(whole)
