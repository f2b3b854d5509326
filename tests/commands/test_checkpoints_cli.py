"""`grpo-autotune checkpoints` on run folders made by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.runs.checkpoints import link, link_epoch, seal


def saved(run: Path, step: int, *, optimizer: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", *(["optimizer.pt"] if optimizer else [])):
        (folder / name).write_bytes(b"0" * 700)
    seal(folder, 1, 8)
    return folder


def logged(run: Path, rows: dict[int, dict[str, Any]]) -> None:
    lines = []
    for step, values in rows.items():
        common = {"step": step, "epoch": step / 10, "time": 1.0}
        lines.append({**common, "kind": "train", "loss": 0.1, "adv_std": 1 / step, "kl": 0.01})
        if values:
            lines.append({**common, "kind": "eval", "eval_runtime": 1.0, **values})
    (run / "train_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Evaluated at 10 to 50; 10 was not kept, 30 is torn, and 40 holds weights alone."""
    for step in (20, 30, 50):
        link_epoch(saved(tmp_path, step), step / 10)
    saved(tmp_path, 40, optimizer=False)
    (tmp_path / "checkpoints/checkpoint-30/optimizer.pt").unlink()
    link(tmp_path / "best", tmp_path / "checkpoints/checkpoint-50")
    rewards = {10: 0.9, 20: 0.5, 30: 0.6, 40: 0.7, 50: 0.8}
    logged(tmp_path, {step: {"eval_reward": value, "eval_loss": step / 100} for step, value in rewards.items()})
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["checkpoints", *words]) == 0
    return capsys.readouterr().out


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(run), "--strategy", "reward")
    rows = [line.split() for line in text.splitlines() if re.search("whole|weights only", line)]
    assert [row[1] for row in rows] == ["checkpoint-50", "checkpoint-40", "checkpoint-20"]
    assert rows[0][2:4] == ["best,", "epoch-5"] and "weights only" in text
    assert "Best by reward: checkpoint-50. Its eval_reward 0.8 is the highest of 3." in text
    assert "step 10, whose checkpoint was not kept, would be first (eval_reward 0.9)" in text
    assert "checkpoint-30 is torn: optimizer.pt is missing." in text and "not kept" not in text.replace(
        "was not kept", ""
    )


def test_json_and_all_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(shown(capsys, str(run), "--strategy", "val_loss", "--show-all", "--json"))
    assert (listed["strategy"], listed["metric"], listed["mode"]) == ("val_loss", "eval_loss", "min")
    assert listed["best"] == "checkpoint-20"
    assert [(row["step"], row["state"], row["place"]) for row in listed["rows"]] == [
        (20, "whole", 1),
        (40, "weights only", 2),
        (50, "whole", 3),
        (30, "torn", None),
        (10, "not kept", None),
    ]
    assert listed["rows"][0]["evaluation"]["eval_reward"] == 0.5 and listed["rows"][0]["bytes"] > 1400


def test_a_run_without_evaluations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(run, {step: {} for step in (10, 20, 30, 40, 50)})
    assert "No best: nothing was evaluated; --strategy ranks by what training logged." in shown(capsys, str(run))
    assert "Best by adv_std: checkpoint-50." in shown(capsys, str(run), "--strategy", "adv_std")
    assert "Best by grad_norm" not in shown(capsys, str(run), "--strategy", "loss", "--mode", "max")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{run}/nowhere"], "nowhere: there is no such folder. Give a run folder of `train`."),
        (["{run}/checkpoints/checkpoint-20"], "there is no checkpoint here. grpo.save_strategy"),
        (
            ["{run}", "--strategy", "rewrd"],
            "rewrd: no such strategy; there are val_loss, ppo_loss, kl, adv_std, reward.",
        ),
        (["{run}", "--strategy", "kl"], "kl: this run logged no eval_kl. There are adv_std, eval_loss"),
        (["{run}", "--strategy", "time"], "time: no such strategy;"),
        (["{run}", "--mode", "lowest"], "Invalid value for '--mode'"),
    ],
)
def test_refused_in_one_line(words: list[str], line: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", *(word.format(run=run) for word in words)]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told and "\n" not in told and len(told) < 420


def test_a_run_whose_checkpoints_are_all_torn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 40, 50):
        (run / f"checkpoints/checkpoint-{step}/adapter_model.safetensors").unlink()
    text = shown(capsys, str(run))
    assert "No best: no checkpoint is whole." in text and text.count(" is torn: ") == 4
    assert main(["checkpoints", str(run), "--strategy", "reward"]) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = saved(tmp_path, 10), saved(tmp_path, 20)
    link_epoch(first, 1.0)
    link_epoch(second, 2.0)
    link_epoch(second, 2.5)
    names = tmp_path / "checkpoints"
    assert sorted(path.name for path in names.glob("epoch-*")) == ["epoch-1", "epoch-2"]
    assert (names / "epoch-1").readlink() == Path("checkpoint-10")
    for file in first.iterdir():
        file.unlink()
    first.rmdir()
    link_epoch(second, 2.0)
    assert [path.name for path in names.glob("epoch-*")] == ["epoch-2"]
    (tmp_path / "best").mkdir()
    link(tmp_path / "best", second)
    assert not (tmp_path / "best").is_symlink()  # somebody's own folder

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link(tmp_path / "last", second)
    link(tmp_path / "last", second)
    assert capsys.readouterr().err.count("Operation not permitted") == 1


@pytest.mark.slow
def test_nothing_heavy_is_loaded() -> None:
    names = "grpo_autotune.commands.checkpoints, grpo_autotune.trained.source, grpo_autotune.render.trained"
    code = f"import sys, {names}; print(sorted({{'torch', 'transformers', 'datasets', 'scipy'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
