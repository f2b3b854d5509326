"""The table of evaluations, from the lines of a log."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.records.evaluation_lines import COLUMNS, RowPrinter, fitting, table_lines
from grpo_autotune.records.evaluations import Evaluation, EvaluationLog, evaluations


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 10, "time": 1.0, **values}


def held_out(step: int, name: str = "", **values: Any) -> dict[str, Any]:
    before = f"eval_{name}_" if name else "eval_"
    return {
        "kind": "eval",
        "step": step,
        "epoch": step / 10,
        f"{before}runtime": 2.0,
        f"{before}loss": step / 100,
        **values,
    }


LOG = [
    held_out(0, eval_reward=0.2),
    train(1, loss=0.1, adv_std=1.0, reward=0.2),
    train(2, loss=0.3, adv_std=0.8, reward=None),
    held_out(2, eval_reward=0.4, eval_reward_ci=0.1, eval_ppo_loss=0.01, eval_beta=0.04),
    train(3, loss=0.9),
    train(4, loss=0.7),
    held_out(4, eval_reward=0.5),
    held_out(4, "hard", eval_reward=0.1),
]


def test_a_row_has_the_means_of_training_since_the_row_before() -> None:
    rows = EvaluationLog(LOG).table({2: "checkpoint-2"}, best=2)
    assert [(row.step, row.held_out, row.loss) for row in rows] == [
        (0, "", None),
        (2, "", pytest.approx(0.2)),
        (4, "", pytest.approx(0.8)),
        (4, "hard", pytest.approx(0.8)),
    ]
    second = rows[1]
    assert (second.adv_std, second.reward, second.beta, second.kept) == (
        pytest.approx(0.9),
        0.2,
        {"": 0.04},
        "checkpoint-2",
    )
    assert (second.low, second.high, second.best, second.seconds) == (pytest.approx(0.3), pytest.approx(0.5), True, 2.0)
    assert rows[2].adv_std is None  # of the row before, and not of this one's steps
    assert rows[3].eval_loss == 0.04 and rows[3].eval_reward == 0.1


def test_of_several_sets_the_first_counts() -> None:
    merged = EvaluationLog(LOG).by_step()[4]
    assert merged["eval_reward"] == 0.5 and merged["eval_hard_loss"] == 0.04


def test_branches_have_their_weights_and_rewards() -> None:
    weights = {"branch/solve/beta": 0.1, "branch/brief/beta": 0.3}
    [row] = EvaluationLog([train(1, **weights), held_out(1, **{"eval_branch/solve/reward": 0.7})]).table()
    assert row.beta == {"solve": 0.1, "brief": 0.3} and row.branches == {"solve": 0.7}


def test_a_log_without_intervals_has_those_of_completions() -> None:
    [row] = evaluations([held_out(1, eval_reward=0.5, eval_reward_std=0.4, eval_samples_per_second=8.0)])
    assert row.eval_reward_ci == pytest.approx(1.96 * 0.4 / 4)


def test_rows_survive_json() -> None:
    for row in EvaluationLog(LOG).table():
        assert Evaluation.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize("width", [40, 80, 140])
def test_lines_fit(width: int) -> None:
    rows = EvaluationLog(LOG).table({2: "checkpoint-2"}, best=2)
    lines = table_lines(rows, width)
    more = lines[5:]
    assert max(map(len, lines[:5])) <= width and len(rows) == 4
    assert "held-out reward" in lines[0] and "0.4000 ±0.1000" in lines[2]
    assert bool(more) == (width < 140) and all(line.startswith("left out for width: ") for line in more)
    assert table_lines([], width) == []


def test_rows_printed_one_by_one_stand_below_their_header() -> None:
    told: list[str] = []
    printer = RowPrinter(told.append, 80)
    for row in EvaluationLog(LOG[:4] * 30).table():
        printer.print(row)
    headers = [line for line in told if "held-out reward" in line]
    assert len(headers) == 4 and len(told) == 64  # one more where the values of training begin
    at = {line.index("0.4000") for line in told if "0.4000" in line}
    assert len(at) == 1 and max(map(len, told)) <= 80
    assert {*fitting(EvaluationLog(LOG).table(), 10**6)} <= {*COLUMNS}
