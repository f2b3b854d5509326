"""Two processes under torchrun: one of them is told to stop, one of them is killed, and one goes on alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.processes.fresh import free_port
from grpo_autotune.runs.checkpoints import survey
from tests.support.training import log_lines, text_config

ROOT = Path(__file__).parents[2]


def torchrun(config: Path, *folders: str, call: int, signum: int) -> subprocess.CompletedProcess[str]:
    """Train on two processes; the second gets a signal while it computes its `call`-th reward."""
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    kill = {"KILL_AT_CALL": str(call), "KILL_SIGNAL": str(int(signum)), "KILL_RANK": "1"}
    return subprocess.run(
        [*launch, "-m", "tests.support.training", str(config), *folders],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PROMPTS_TO": str(config.parent / "prompts-"), **kill},
        capture_output=True,
        text=True,
    )


def prompts(file: Path) -> list[set[str]]:
    """The prompts of each of a rank's generations."""
    return [set(map(json.dumps, json.loads(line))) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.timeout(600)
def test_two_processes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two ranks is killed, one stopped by a signal; then a process alone goes on with what both had."""
    grpo = {"max_steps": 9, "num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    changes = {"monitors": {"truncated": {"above": 0.001, "steps": 2, "action": "checkpoint"}}}
    config = text_config(tiny("qwen3"), tmp_path, changes, per_device_train_batch_size=2, save_steps=3, **grpo)
    path, whole, cut = tmp_path / "run.yaml", tmp_path / "whole", tmp_path / "cut"
    path.write_text(config.to_yaml(), encoding="utf-8")

    killed = torchrun(path, str(whole), str(cut), call=5, signum=signal.SIGKILL)
    assert "exitcode: -9" in killed.stderr.replace(" :", ":").replace("  ", ""), killed.stderr
    assert killed.stderr.count("step 9/9") == 1  # the first process tells, the second does not
    assert [line["step"] for line in log_lines(whole)] == list(range(1, 10))
    assert [(c.step, c.flaw) for c in survey(cut / "checkpoints")] == [(3, None)]
    assert (cut / "checkpoints" / "checkpoint-3" / "grpo_state_1.pt").exists()
    both = [prompts(tmp_path / f"prompts-{rank}")[:3] for rank in range(2)]  # of the run that was left alone

    resumed = torchrun(path, f"{cut}+", f"{cut}+", call=1, signum=signal.SIGUSR1)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 3" in resumed.stderr and "resuming at step 5" in resumed.stderr
    for rank in range(2):  # the signal reached one of them, and both stopped after the same step
        assert f"{cut}+ rank {rank} exit code 138" in resumed.stdout
        assert f"{cut}+ rank {rank} exit code 0" in resumed.stdout
    assert log_lines(cut) == log_lines(whole)

    alone = tmp_path / "alone"
    shutil.copytree(cut / "checkpoints" / "checkpoint-3", alone / "checkpoints" / "checkpoint-3")
    monkeypatch.setenv("PROMPTS_TO", str(tmp_path / "alone-"))
    assert main(["train", str(path), "--out", str(alone), "--resume", "auto"]) == 0
    said = capfd.readouterr().err
    assert "had 2 ranks and 4 completions per step" in said and "grpo.gradient_accumulation_steps 2, " in said
    assert [line["step"] for line in log_lines(alone)] == list(range(4, 10))
    assert prompts(tmp_path / "alone-0") == [one | other for one, other in zip(*both, strict=True)]
