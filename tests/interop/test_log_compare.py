"""Logs held against each other and against a probe: on rows that both can tell, and what cannot is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_autotune.commands.compare import check_slower, compare_runs
from grpo_autotune.commands.interop.config import import_log
from grpo_autotune.errors import ConfigError
from grpo_autotune.records.comparison import Pair
from grpo_autotune.records.imported import TRAINING_PASS
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import save_report
from tests.support import logs
from tests.support.sample_records import demo_record


def verl(path: Path, scale: float = 1.0, **timers: float) -> str:
    steps = ((n, logs.verl_step(n, scale * (1.0 + 0.01 * (n % 3)), **timers)) for n in range(1, 9))
    path.write_text("\n".join(logs.verl_line(n, step) for n, step in steps))
    return str(path)


def pair(*names: str) -> Pair:
    return compare_runs(names, None).pairs[0]


def test_two_logs_are_compared_row_by_row(tmp_path: Path) -> None:
    slow = logs.TIMED | {"update_actor": 60.0}
    names = verl(tmp_path / "a.log"), verl(tmp_path / "b.log", **slow)
    result = pair(*names)
    words = {row.name: row.word for row in result.rows}
    assert (words["step"], words[TRAINING_PASS], words["reward"]) == ("slower", "slower", "within noise")
    assert result.rows[0].before_s == pytest.approx(sum(row.before_s for row in result.rows[1:]))
    assert result.apart == []
    assert "names no machine" in result.differences[0]
    assert check_slower(compare_runs(names, None), 10.0) == [names[1]]


def test_a_stored_report_of_a_log_is_the_same_as_the_log(tmp_path: Path) -> None:
    a, b = verl(tmp_path / "a.log"), verl(tmp_path / "b.log", 1.3)
    import_log(Path(b), out=tmp_path / "b.json")
    assert pair(a, str(tmp_path / "b.json")).rows == pair(a, b).rows


def test_a_probe_is_cut_into_the_rows_of_the_log(tmp_path: Path) -> None:
    report = build_report(demo_record())
    save_report(report, tmp_path / "probe")
    result = pair(verl(tmp_path / "a.log"), str(tmp_path / "probe"))
    rows = {row.name: row for row in result.rows}
    stage_s = {row.name: row.self_s for row in report.stages}
    old_s = sum(part.self_s for part in report.stage("policy_logprob").parts if part.name == "old_policy")
    together = stage_s["policy_logprob"] - old_s + stage_s["backward"] + stage_s["optimizer"] + stage_s["sync_wait"]
    assert rows[TRAINING_PASS].after_s == pytest.approx(together)
    assert rows["reward"].after_s == pytest.approx(stage_s["reward"])
    assert rows["step"].after_s == pytest.approx(report.step_s - stage_s["data"] - stage_s["log_save_eval"])
    assert rows["step"].scale == pytest.approx(64 / report.trainer.rows)
    assert any("data" in line and "does not time it" in line for line in result.differences)
    with pytest.raises(ConfigError, match="names no machine"):
        check_slower(compare_runs((str(tmp_path / "a.log"), str(tmp_path / "probe")), None), 1.0)


def test_a_log_of_whole_steps_is_compared_by_the_step(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(
        json.dumps({"log_history": [{"step": n, "loss": 0.1, "step_time": 40.0 + n % 2} for n in range(1, 9)]})
    )
    result = pair(verl(tmp_path / "a.log"), str(tmp_path / "state.json"))
    assert [row.name for row in result.rows] == ["step"]
    assert "whole steps alone" in result.differences[-1]
    assert "completions per step are not in every log" in result.apart[0]


def test_a_timer_of_somebodys_own_stands_for_what_is_absent(tmp_path: Path) -> None:
    own = {"my_rollout": 40.0, "update_actor": 30.0}
    rows = pair(verl(tmp_path / "a.log"), verl(tmp_path / "b.log", **own)).rows
    assert next(row for row in rows if "my_rollout" in row.name).before_s > 50.0
    assert not [row.name for row in rows if row.after_s == 0.0]


def test_a_critic_is_a_row_of_its_own(tmp_path: Path) -> None:
    critic = logs.TIMED | {"values": 5.0, "update_critic": 28.0}
    rows = {row.name: row.after_s for row in pair(verl(tmp_path / "a.log"), verl(tmp_path / "b.log", **critic)).rows}
    assert rows["critic's training"] == pytest.approx(28.0, rel=0.05)
    assert rows["other"] < 1.0


def test_a_report_of_another_version_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": "grpo-autotune/log/2", "whole": "timing_s/step"}')
    with pytest.raises(ConfigError, match="log/2"):
        pair(verl(tmp_path / "a.log"), str(tmp_path / "a.json"))
