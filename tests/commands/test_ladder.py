"""A real limit on memory breaks a step: the run mends itself, and learns what one with smaller micro batches learns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_autotune.commands import ladder
from grpo_autotune.commands.ladder import Ladder, stage_of
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import TrainingError
from grpo_autotune.knobs import with_knobs
from grpo_autotune.records.alerts import load_alerts, load_rungs
from grpo_autotune.runs.checkpoints import link
from grpo_autotune.train.trainer import run_training
from tests.support.training import log_lines, losses, text_config

ROOT = Path(__file__).parents[2]
MICRO = "grpo.per_device_train_batch_size"


def narrow(config: RunConfig, out: Path, rows: int) -> subprocess.CompletedProcess[str]:
    """Train by the command, with memory for so many rows from step 3 on."""
    file = out.with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "tests.support.narrow", "train", str(file), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NARROW_STEP": "3", "NARROW_ROWS": str(rows)},
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(300)
def test_a_run_that_runs_out_of_memory_ends_by_itself_and_learns_the_same(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    config = text_config(tiny("qwen3"), tmp_path, {"on_oom": "ladder"}, max_steps=3)
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = narrow(config, run, rows=2)
    assert command.returncode == 0, command.stderr
    assert "resuming at step 2" in command.stderr and "no page: RLIMIT_AS: " in command.stderr
    (rung,) = load_rungs(run)
    assert (rung.change, rung.kind, rung.step) == (f"{MICRO} 4 -> 2", "exact", 3)
    assert rung.value is not None and rung.limit is not None and 0 < rung.value < rung.limit
    assert [alert.name for alert in load_alerts(run)] == ["out_of_memory at step 3"]
    assert (run / "model").is_dir()

    half = with_knobs(config, {MICRO: 2})
    assert RunConfig.from_yaml((run / "config.yaml").read_text()).grpo == half.grpo
    run_training(half, whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4, abs=1e-6)
    assert [line["reward"] for line in log_lines(run)] == [line["reward"] for line in log_lines(whole)]


def test_every_later_resume_begins_at_the_foot_of_the_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to its end, which is one line that names what was tried."""
    config = text_config(tmp_path, tmp_path, {"on_oom": "ladder"})
    begun: list[list[str]] = []

    def stand_in(options: list[str], environment: object) -> None:
        begun.append(options)
        raise SystemExit

    monkeypatch.setattr(ladder, "start_anew", stand_in)
    for steps in range(2):
        with pytest.raises(SystemExit), Ladder(config, tmp_path, resume=bool(steps)) as now:
            now.begin(SimpleNamespace(state=SimpleNamespace(global_step=steps)))
            raise MemoryError
    assert begun == [["--resume"]] * 2
    with pytest.raises(TrainingError) as ended, Ladder(config, tmp_path, resume=True) as now:
        assert now.config == with_knobs(config, {MICRO: 1})
        now.begin(SimpleNamespace(state=SimpleNamespace(global_step=2)))
        raise MemoryError
    tried = f"{MICRO} 4 -> 2; {MICRO} 2 -> 1"
    assert str(ended.value).startswith(
        f"step 3: memory ran out (MemoryError), and no rung of on_oom ladder helps here (taken: {tried}). on_oom_allow"
    )
    assert f"ladder.jsonl: {MICRO} 2 -> 1, since memory ran out in step 2" in capsys.readouterr().err
    assert Ladder(now.config, tmp_path, resume=True).config == now.config  # `config.yaml` of the run folder
    with Ladder(config, tmp_path, resume=False) as now:  # a run from the beginning leaves it behind
        now.begin(SimpleNamespace(state=SimpleNamespace(global_step=0)))
    assert now.config == config and load_rungs(tmp_path) == []


def test_without_a_ladder_and_for_other_errors_nothing_happens(tmp_path: Path) -> None:
    for mode, error in (("stop", MemoryError), ("ladder", ValueError), ("ladder", KeyboardInterrupt)):
        with pytest.raises(error), Ladder(text_config(tmp_path, tmp_path, {"on_oom": mode}), tmp_path, resume=False):
            raise error
    assert not (tmp_path / "ladder.jsonl").exists()


def test_checkpoints_of_another_rank_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"on_oom": "ladder", "on_oom_allow": ["lora_rank"]}
    config = text_config(tmp_path, tmp_path, changes, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    for name in ("best", "last"):
        link(tmp_path / name, tmp_path / "checkpoints" / "checkpoint-2")
    (tmp_path / "checkpoints-before-rung-1" / "checkpoint-4").mkdir(parents=True)  # of an earlier run in this folder
    monkeypatch.setattr(ladder, "start_anew", lambda options, environment: sys.exit())
    with pytest.raises(SystemExit), Ladder(config, tmp_path, resume=False) as now:
        now.begin(SimpleNamespace(state=SimpleNamespace(global_step=2)))
        raise MemoryError
    (rung,) = load_rungs(tmp_path)
    assert (rung.change, rung.kind) == ("peft.r 4 -> 2", "learning") and "begins again" in rung.remedy
    assert (tmp_path / "checkpoints-before-rung-2" / "checkpoint-2").is_dir()
    assert not any((tmp_path / name).is_symlink() for name in ("best", "last")), "they would point to nothing"


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
