"""What is measured and predicted of ranks that share a training under real ZeRO: waits, stragglers, bytes, a plan."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.sharding import shares_of
from grpo_autotune.records.report import Report
from tests.support.training import text_config, uneven
from tests_scale.runs import train_all

Reports = dict[int, Report]
LATE_S = 0.6


def late(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward for which rank 1 needs longer."""
    if os.environ.get("RANK") == "1":
        time.sleep(LATE_S)
    return uneven(completion_ids, **columns)


@pytest.fixture(scope="module")
def place(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of an adapter under ZeRO-2 and of all weights under ZeRO-3, which shares small ones too."""
    place, small = tmp_path_factory.mktemp("shards"), {"per_device_train_batch_size": 2, "max_steps": 3}
    late_reward = {"rewards": [{"name": "tests_scale.test_shards_measured:late"}]}
    stages: dict[int, Any] = {
        2: "zero2",
        3: {"name": "zero3", "zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    plan = []
    for stage, deepspeed in stages.items():
        changes = {**late_reward, **({"peft": None} if stage == 3 else {})}
        config = text_config(tiny("qwen3"), place, changes, deepspeed=deepspeed, save_strategy="no", **small)
        plan.append({"config": config.to_dict(), "folder": f"{place}/zero{stage}", "probe": True})
    train_all(plan, place / "plan.json")
    return place


@pytest.fixture
def reports(place: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    monkeypatch.setenv("WORLD_SIZE", "2")
    return {n: Report.model_validate_json((place / f"zero{n}" / "report.json").read_text()) for n in (2, 3)}


def parts(report: Report) -> dict[str, float]:
    return {part.name: part.self_s for part in report.stage("sync_wait").parts}


def test_collectives_are_apart_from_work_and_the_books_balance(reports: Reports) -> None:
    for report in reports.values():
        assert sum(row.self_s for row in report.stages) == pytest.approx(report.step_s)
        assert sum(parts(report).values()) == pytest.approx(report.stage("sync_wait").self_s)
        assert report.stage("optimizer").self_s > 0.0  # DeepSpeed's, which updates within the backward pass
        assert min(parts(report)[name] for name in ("reduce_gradients", "exchange", "gather_parameters")) > 0.0
    calls = {n: report.stage("sync_wait").calls for n, report in reports.items()}
    assert calls[3] > 2 * calls[2]  # each layer is gathered for each pass


def test_every_rank_has_its_work_and_its_wait_and_the_late_one_is_named(reports: Reports) -> None:
    for report in reports.values():
        assert report.ranks is not None
        waits = [row.wait_s for row in report.ranks.rows]
        assert [row.rank for row in report.ranks.rows] == [0, 1] and waits[0] > waits[1]
        assert all(row.compute_s + row.wait_s == pytest.approx(row.step_s) for row in report.ranks.rows)
        (straggler,) = report.ranks.stragglers
        assert (straggler.rank, straggler.stage) == (1, "reward")
        assert straggler.others_wait_s == pytest.approx(waits[0] - waits[1])


def test_bytes_of_parameters_are_those_that_the_formula_predicts(reports: Reports, place: Path) -> None:
    for stage, report in reports.items():
        trainer = report.trainer
        assert trainer.sharding is not None and trainer.sharding.stage == stage and trainer.sharding.ranks == 2
        assert trainer.sharding.optimizer == pytest.approx(0.5, abs=0.01)
        shape = ModelShape.from_config(trainer.model_config_json)
        whole = 4 * (trainer.trainable_parameters if stage == 2 else 0) + 4 * shape.parameters
        predicted = whole * shares_of(trainer.sharding, on_gpu=False).parameters
        assert trainer.sharding.parameter_bytes == pytest.approx(predicted, rel=0.01)
        assert trainer.parameters * 4 == whole


def test_a_stored_run_is_planned_at_the_other_stages(
    reports: Reports, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(place / "zero3"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tables"]["sharding"]}
    assert list(rows) == ["ZeRO-3 (now)", "ZeRO-1", "ZeRO-2"]
    assert rows["ZeRO-1"]["peak_bytes"][0] > rows["ZeRO-2"]["peak_bytes"][0] > 0
    assert rows["ZeRO-2"]["speed"] > 1.0
