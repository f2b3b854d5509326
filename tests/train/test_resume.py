"""A run that ends too early and goes on has the losses of one that was left alone: to the last digit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from grpo_autotune.commands.checkpoints import list_checkpoints
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import with_knobs
from grpo_autotune.runs.checkpoints import survey
from grpo_autotune.train.runs import signals
from grpo_autotune.train.runs.resumable import ResumableTrainer
from grpo_autotune.train.trainer import TrainResult, run_training
from grpo_autotune.trained.source import find_trained
from tests.support.training import arm, log_lines, losses, picture_config, text_config

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[2]


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would begin anew there, over what was trained."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError):
        survey(tmp_path)


def stopped(config: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> TrainResult:
    """Run until SIGTERM arrives in the middle of a step."""
    arm(monkeypatch, call, signal.SIGTERM)
    result = run_training(config, out)
    monkeypatch.delenv("KILL_AT_CALL")
    return result


def killed(config: RunConfig, out: Path, folder: Path, call: int) -> None:
    """Run in a child process until `kill -9` arrives in the middle of a step."""
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.training", str(folder / "run.yaml"), str(out)],
        cwd=ROOT,
        env={**os.environ, "KILL_AT_CALL": str(call), "KILL_SIGNAL": str(int(signal.SIGKILL))},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


KILLED: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "reused": (
        {
            "data": {"eval_split": "train", "max_eval_samples": 2},
            "peft": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2},
        },
        {
            "max_steps": 8,
            "num_iterations": 2,
            "steps_per_generation": 3,
            "save_steps": 4,
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "per_device_eval_batch_size": 4,
        },
        5,
        4,
    ),
    "in the evaluation of an epoch": (
        {"data": {"eval_split": "train", "max_eval_samples": 2}, "checkpoints": {"choose": "reward"}},
        {
            "max_steps": -1,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "per_device_eval_batch_size": 4,
        },
        6,
        1,
    ),
}
"""Changes, grpo keys, the reward call (evaluation's count too) at which to kill, the newest checkpoint's step then."""


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed(name: str, tiny: Tiny, tmp_path: Path) -> None:
    changes, grpo, call, step = KILLED[name]
    config = text_config(tiny("qwen3"), tmp_path, changes, **grpo)
    run_training(config, tmp_path / "whole")
    killed(config, tmp_path / "cut", tmp_path, call)
    assert survey(tmp_path / "cut" / "checkpoints")[0].step == step
    result = run_training(config, tmp_path / "cut", resume=True)
    assert result.resumed_from == step and result.signum == 0
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) > 1  # the runs learned something that could differ
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    if grpo.get("save_strategy") == "epoch":
        names = [f"epoch-{n}" for n in range(1, 5)]
        assert [Path(tmp_path / "cut" / "checkpoints" / name).resolve().name for name in names] == [
            f"checkpoint-{n}" for n in range(1, 5)
        ]
        assert find_trained(tmp_path / "cut" / "last").name == find_trained(tmp_path / "cut/epoch-4").name
        for strategy, pick in picks(tmp_path / "whole").items():
            assert list_checkpoints(tmp_path / "cut", strategy).best == f"checkpoint-{pick}", strategy


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of `evaluations.jsonl` without seconds, and where `best` and `last` point to."""
    file = folder / "evaluations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    ends = {name: (folder / name).readlink() for name in ("best", "last") if (folder / name).is_symlink()}
    return [*({**row, "seconds": None} for row in rows), ends]


def picks(folder: Path) -> dict[str, int]:
    """The step that each strategy picks, from the log alone, where each evaluation follows one step."""
    lines = log_lines(folder)
    held_out = {line["step"]: line for line in lines if line["kind"] == "eval"}
    trained = {line["step"]: line for line in lines if line["kind"] == "train"}
    inside = {step: line for step, line in held_out.items() if 0.01 <= line["eval_kl"] <= 0.1}
    near = min(held_out, key=lambda step: max(0.01 - held_out[step]["eval_kl"], held_out[step]["eval_kl"] - 0.1))
    return {
        "val_loss": min(held_out, key=lambda step: held_out[step]["eval_loss"]),
        "ppo_loss": min(held_out, key=lambda step: held_out[step]["eval_ppo_loss"]),
        "adv_std": min(trained, key=lambda step: trained[step]["adv_std"]),
        "reward": earliest(held_out),
        "kl": earliest(inside) if inside else near,
    }


def earliest(lines: dict[int, Any]) -> int:
    top = max(lines, key=lambda step: lines[step]["eval_reward"])
    least = lines[top]["eval_reward"] - lines[top]["eval_reward_ci"]
    return min(step for step in lines if lines[step]["eval_reward"] >= least)


def test_the_best_stays_outside_of_rotation(tiny: Tiny, tmp_path: Path) -> None:
    """It is saved where the strategy saves nothing, and stays when newer ones take the places of older ones."""
    changes = {"data": {"eval_split": "train", "max_eval_samples": 2}, "checkpoints": {"choose": "val_loss"}}
    grpo = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "save_steps": 3}
    config = text_config(tiny("qwen3"), tmp_path, changes, max_steps=5, save_total_limit=1, **grpo)
    run_training(config, tmp_path / "run")
    losses_by_step = {line["step"]: line["eval_loss"] for line in log_lines(tmp_path / "run") if line["kind"] == "eval"}
    best = min(losses_by_step, key=lambda step: losses_by_step[step])
    assert len(losses_by_step) == 5
    assert {one.step for one in survey(tmp_path / "run" / "checkpoints")} == {best, 5}
    assert find_trained(tmp_path / "run" / "best").name == f"checkpoint-{best}"
    assert find_trained(tmp_path / "run" / "last").name == "checkpoint-5"


STOPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "second epoch, between log lines": ("qwen3", {}, {"max_steps": 6, "logging_steps": 3}, 5),
    "all weights, moving reference": (
        "llama",
        {"peft": None},
        {"learning_rate": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 1},
        2,
    ),
    "four bits": ("qwen3", {"model": {"load_in_4bit": True}}, {"max_steps": 3}, 2),
    "with completions": ("qwen3", {}, {"num_iterations": 2, "log_completions": True, "num_completions_to_print": 1}, 1),
    "pictures, reused": (
        "qwen3_vl",
        {"model": {"freeze_vision_tower": True}},
        {"num_iterations": 2, "steps_per_generation": 4},
        1,
    ),
    "pictures, all weights": ("qwen2_5_vl", {"peft": None}, {"learning_rate": 1e-3, "max_steps": 3}, 2),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_and_resumed(name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes, grpo, call = STOPPED[name]
    make = picture_config if kind.endswith("vl") else text_config
    config = make(tiny(kind), tmp_path, changes, **grpo)
    whole = run_training(config, tmp_path / "whole")
    result = stopped(config, tmp_path / "cut", monkeypatch, call)
    assert result.signum == signal.SIGTERM and result.exit_code == 143
    assert 0 < result.steps < whole.steps
    again = run_training(config, tmp_path / "cut", resume=True)
    assert (again.resumed_from, again.steps) == (result.steps, whole.steps)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


IN_PARTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "rollouts left": ("qwen3", {"num_iterations": 2, "steps_per_generation": 4}, 1),
    "pictures left": ("qwen3_vl", {"num_iterations": 2, "steps_per_generation": 4}, 1),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_resumed_with_half_the_micro_batch(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on at the right row, and learns what a run does that had the half from the beginning."""
    kind, grpo, call = IN_PARTS[name]
    make = picture_config if kind.endswith("vl") else text_config
    config = make(tiny(kind), tmp_path, **grpo)
    half = with_knobs(config, {"grpo.per_device_train_batch_size": 2})
    result = stopped(config, tmp_path / "cut", monkeypatch, call)
    assert result.signum == signal.SIGTERM
    run_training(half, tmp_path / "cut", resume=True)
    run_training(half, tmp_path / "whole")
    lines, expected = (
        [{key: value for key, value in line.items() if isinstance(value, float)} for line in log_lines(tmp_path / run)]
        for run in ("cut", "whole")
    )
    assert len(lines) == 4 and lines == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in expected]
    for key in ("reward", "num_tokens"):  # the very same completions
        assert [line.get(key) for line in lines] == [line.get(key) for line in expected]


def test_torn_checkpoint(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint is cut short: the one before it is taken, and said so."""
    config = text_config(tiny("qwen3"), tmp_path)
    run_training(config, tmp_path / "run")
    before = log_lines(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    weights = newest / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    capfd.readouterr()
    result = run_training(config, tmp_path / "run", resume=True)
    told = capfd.readouterr().err
    assert "checkpoint-4 is torn (adapter_model.safetensors has" in told and "resuming at step 2" in told
    assert (result.resumed_from, result.steps) == (2, 4)
    assert log_lines(tmp_path / "run") == before
    assert [c.flaw for c in survey(newest.parent)] == [None, None]
    assert (newest.parent / "torn-checkpoint-4" / "optimizer.pt").exists()


def test_checkpoint_of_plain_transformers(tiny: Tiny, tmp_path: Path) -> None:
    """Without our marker and state, a checkpoint is still taken, at the right place in the data."""
    config = text_config(tiny("qwen3"), tmp_path)
    run_training(config, tmp_path / "run")
    before = losses(tmp_path / "run")
    for checkpoint in survey(tmp_path / "run" / "checkpoints"):
        (checkpoint.path / "complete.json").unlink()
        (checkpoint.path / "grpo_state_0.pt").unlink()
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    result = run_training(config, tmp_path / "run", resume=True)
    assert result.resumed_from == 2
    assert losses(tmp_path / "run") == before  # in step with generations, nothing else is needed


def test_a_run_is_never_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    config = text_config(tiny("qwen3"), tmp_path, max_steps=1, save_steps=1)
    run_training(config, tmp_path / "run")
    files = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match=r"checkpoints up to step 1 already.*--resume"):
        run_training(config, tmp_path / "run")
    assert sorted((tmp_path / "run").rglob("*")) == files


def test_resume_before_the_first_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """Whoever restarts blindly with --resume gets a fresh run, and a clean log."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr', encoding="utf-8")
    result = run_training(text_config(tiny("qwen3"), tmp_path, max_steps=2), tmp_path / "run", resume=True)
    assert result.resumed_from is None
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2]


def test_a_finished_run_resumed_does_nothing(tiny: Tiny, tmp_path: Path) -> None:
    config = text_config(tiny("qwen3"), tmp_path, max_steps=2)
    run_training(config, tmp_path / "run")
    before = log_lines(tmp_path / "run")
    result = run_training(config, tmp_path / "run", resume=True)
    assert (result.steps, result.signum, result.metrics["step"]) == (2, 0, 2)
    assert log_lines(tmp_path / "run") == before


class AtSave(TrainerCallback):
    """A scheduler whose signal comes twice while the first checkpoint is written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)


def test_signals_in_a_save_cost_no_further_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "FORWARD_S", -1.0)  # the second is no launcher's copy
    result = run_training(text_config(tiny("qwen3"), tmp_path), tmp_path / "run", callbacks=[AtSave()])
    assert (result.steps, result.exit_code) == (2, 128 + signal.SIGUSR2)
    assert [checkpoint.step for checkpoint in survey(tmp_path / "run" / "checkpoints")] == [2]


def test_a_signal_in_an_evaluation_is_saved_though_no_evaluation_was_better(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "save_strategy": "best",
        "metric_for_best_model": "runtime",
        "greater_is_better": True,
    }
    held_out = {"data": {"eval_split": "train", "max_eval_samples": 1}}
    config = text_config(tiny("qwen3"), tmp_path, held_out, **grpo)
    monkeypatch.setattr(ResumableTrainer.__base__, "_determine_best_metric", lambda *args, **kwargs: False)
    arm(monkeypatch, 4, signal.SIGUSR1)  # of step 2's evaluation
    result = run_training(config, tmp_path / "run")
    assert (result.steps, result.exit_code) == (2, 128 + signal.SIGUSR1)
    assert [checkpoint.step for checkpoint in survey(tmp_path / "run" / "checkpoints")] == [2]


def test_a_finished_model_is_whole(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is cut short leaves no folder that says that training has finished."""

    def cut_short(trainer: Any, folder: str, **kwargs: Any) -> None:
        Path(folder).mkdir()
        raise OSError("cut short")

    config = text_config(tiny("qwen3"), tmp_path, max_steps=1, save_strategy="no")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut short"):
        patch.setattr(ResumableTrainer, "save_model", cut_short)
        run_training(config, tmp_path / "run")
    assert run_training(config, tmp_path / "run", resume=True).steps == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.yaml", "model", "train_log.jsonl"
    ]  # fmt: skip
