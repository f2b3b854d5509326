"""`probe` and `train` in this process: a crash, a signal and a full disk lose nothing that was measured or saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.commands import probe, train
from grpo_autotune.errors import EnvironmentProblem, RewardError
from grpo_autotune.processes.ending import Stopped, raising
from grpo_autotune.records.report import Report
from grpo_autotune.train.runs import callbacks
from tests.support.training import arm, text_config, uneven

Tiny = Callable[[str], Path]
REFRESH = 'http-equiv="refresh"'
_calls = 0
_refreshed: list[bool] = []


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (probe, train):
        monkeypatch.setattr(command, "set_environment", lambda: None)
        monkeypatch.setattr(command, "mend_torchvision", lambda: None)
        monkeypatch.setattr(command, "expand_segments", lambda environment: None)


def failing(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that raises at its fourth call."""
    global _calls
    _calls += 1
    if _calls == 4:
        raise RuntimeError("the judge is gone")
    return uneven(completion_ids, **columns)


def crowding(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that leaves no room for the optimizer's state in the checkpoint to come; it looks at the page."""
    page = Path(os.environ["PAGE"])
    _refreshed.append(page.exists() and REFRESH in page.read_text())
    if folder := os.environ.pop("CROWDED", None):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "optimizer.pt").symlink_to("/dev/full")
    return uneven(completion_ids, **columns)


def measure(config: Any, out: Path, steps: int, shown: list[Report]) -> None:
    with raising():
        probe.probe_config(config, steps=steps, out_dir=out, output=nullcontext(), show=shown.append)


def test_an_evaluation_and_a_checkpoint_are_timed_where_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    grpo = {"eval_strategy": "steps", "eval_steps": 50, "per_device_eval_batch_size": 4}
    config = text_config(tiny("qwen3"), tmp_path, {"data": {"eval_split": "train[:4]"}}, **grpo)
    shown: list[Report] = []
    out = {"out_dir": tmp_path / "out", "output": nullcontext()}
    probe.probe_config(config, steps=1, show=shown.append, with_eval=True, **out)
    (report,) = shown
    assert report.occasions["evaluate"] > 0.0 < report.occasions["save"]
    assert (report.trainer.train_rows, report.trainer.held_out_rows) == (8, 4)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_as_many_steps_as_asked_for_whatever_the_run_is_configured_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where spans cannot be written, they are measured all the same."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "spans.jsonl").symlink_to("/dev/full")
    shown: list[Report] = []
    measure(text_config(tiny("qwen3"), tmp_path, max_steps=2), tmp_path / "out", 3, shown)
    assert [report.steps for report in shown] == [[2, 3, 4]]
    told = capsys.readouterr().err
    assert told.count("spans.jsonl ends before step 1: No space left on device") == 1


def test_a_probe_that_fails_shows_the_steps_that_it_measured(tiny: Tiny, tmp_path: Path) -> None:
    shown: list[Report] = []
    config = text_config(tiny("qwen3"), tmp_path, {"rewards": [{"name": f"{__name__}:failing"}]})
    with pytest.raises(RewardError, match="the judge is gone"):
        measure(config, tmp_path / "out", 8, shown)
    assert [report.steps for report in shown] == [[2, 3]]


def test_a_probe_that_a_scheduler_stops_shows_them_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Report] = []
    arm(monkeypatch, 3, signal.SIGUSR1)
    with pytest.raises(Stopped) as stopped:
        measure(text_config(tiny("qwen3"), tmp_path), tmp_path / "out", 8, shown)
    assert stopped.value.signum == signal.SIGUSR1 and [report.steps for report in shown] == [[2]]


def read_until_stopped(split: str) -> Any:
    signal.raise_signal(signal.SIGUSR1)


def test_a_signal_while_data_is_read_ends_at_once(tiny: Tiny, tmp_path: Path) -> None:
    config = text_config(tiny("qwen3"), tmp_path, {"data": {"path": f"{__name__}:read_until_stopped"}})
    with pytest.raises(Stopped), raising():
        train.train_config(config, out_dir=tmp_path / "run", resume=False)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["live.json"]


def test_a_full_disk_under_a_checkpoint_is_one_line_and_resumed_once_there_is_room(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROWDED", str(tmp_path / "run" / "checkpoints" / "checkpoint-3"))
    page = tmp_path / "run" / "report.html"
    monkeypatch.setenv("PAGE", str(page))
    monkeypatch.setattr(callbacks, "PAGE_EVERY_S", 0.0)
    monkeypatch.setattr(callbacks, "PAGE_COST", 0)
    rewards = {"rewards": [{"name": f"{__name__}:crowding"}]}
    config = text_config(tiny("qwen3"), tmp_path, rewards, save_steps=3)
    with pytest.raises(EnvironmentProblem, match=r"run: the disk is full: .* bytes are free\).*--resume") as full:
        train.train_config(config, out_dir=tmp_path / "run", resume=False)
    assert len(str(full.value)) < 400
    assert " per step: " in capsys.readouterr().err and (tmp_path / "run" / "report.json").exists()
    assert _refreshed == [False, True, True] and REFRESH not in page.read_text()
    assert train.train_config(config, out_dir=tmp_path / "run", resume=True) == 0
    assert (tmp_path / "run" / "model").exists() and REFRESH not in page.read_text()
