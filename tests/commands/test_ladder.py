"""A real limit on memory breaks a step: the run mends itself, and learns what one with smaller micro batches learns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.commands.ladder import stage_of
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs import with_knobs
from grpo_autotune.records.alerts import load_alerts
from grpo_autotune.records.ladder import load_rungs
from grpo_autotune.train.trainer import run_training
from tests.support.training import log_lines, losses, text_config

ROOT = Path(__file__).parents[2]
MICRO = "grpo.per_device_train_batch_size"


def narrow(config: RunConfig, out: Path, *options: str, rows: int) -> subprocess.CompletedProcess[str]:
    """Train by the command, with memory for so many rows from step 3 on."""
    file = out.with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "tests.support.narrow", "train", str(file), "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NARROW_STEP": "3", "NARROW_ROWS": str(rows)},
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(300)
def test_a_run_that_runs_out_of_memory_ends_by_itself_and_learns_the_same(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    config = text_config(tiny("qwen3"), tmp_path, {"on_oom": "ladder"})
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = narrow(config, run, rows=2)
    assert command.returncode == 0, command.stderr
    assert "resuming at step 2" in command.stderr and "no page: RLIMIT_AS: " in command.stderr
    (rung,) = load_rungs(run)
    assert (rung.change, rung.kind, rung.step) == (f"{MICRO} 4 -> 2", "exact", 3)
    assert 0 < rung.held_bytes < rung.limit_bytes
    assert [alert.name for alert in load_alerts(run)] == ["out_of_memory at step 3"]
    assert (run / "model").is_dir()

    half = with_knobs(config, {MICRO: 2})
    assert RunConfig.from_yaml((run / "config.yaml").read_text()).grpo == half.grpo
    run_training(half, whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4, abs=1e-6)
    assert [line["reward"] for line in log_lines(run)] == [line["reward"] for line in log_lines(whole)]

    ended = narrow(config, run, "--resume", "--set", "grpo.max_steps=5", rows=0)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert f"{MICRO} 4 -> 2, since memory ran out in step 3" in ended.stderr  # a later resume starts there
    assert ended.stderr.splitlines()[-1].startswith("grpo-autotune: step 5: memory ran out (RuntimeError: ")
    assert f"no rung of on_oom ladder helps here (taken: {MICRO} 4 -> 2; {MICRO} 2 -> 1). on_oom" in ended.stderr


def evaluation_loop() -> None:
    raise MemoryError


def _generate_single_turn() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("where", "begun", "stage"),
    [
        (evaluation_loop, True, None),
        (_generate_single_turn, True, "generation"),
        (_generate_single_turn, False, "engine"),
        (lambda: bytearray(1 << 60), True, "training"),
    ],
)
def test_the_part_that_ran_out_is_known_by_the_functions_under_way(
    where: Callable[[], object], begun: bool, stage: str | None
) -> None:
    with pytest.raises(MemoryError) as raised:
        where()
    assert stage_of(raised.value, begun=begun) == stage
