"""The summary of completions: means over completions of prompts, their intervals, and branches apart."""

from __future__ import annotations

import pytest
from scipy import stats

from grpo_autotune.records.trained import Inference
from grpo_autotune.render.trained import render_inference
from grpo_autotune.report.inference import summarize
from tests.trained.test_completions import SETTINGS, completion


def summary() -> Inference:
    rewards = {0: (1.0, 0.0), 1: (1.0, 1.0), 2: (0.0, None)}
    made = [
        completion(row, sample).model_copy(
            update={
                "rewards": {"right": value},
                "total": value,
                "failed": [] if value is not None else ["right"],
                "branch": "odd" if row == 1 else "even",
                "truncated": row == 2,
            }
        )
        for row, values in rewards.items()
        for sample, value in enumerate(values)
    ]
    return summarize(made, SETTINGS, out="out.jsonl", written=2, tokens_per_s=12.0)


def test_an_interval_is_over_prompts_and_a_failed_score_is_none() -> None:
    told = summary()
    whole = next(score for score in told.scores if (score.branch, score.reward) == (None, "right"))
    ends = stats.ttest_1samp([0.5, 1.0, 0.0], 0.0).confidence_interval(0.95)
    assert (whole.low, whole.high) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert (whole.mean, whole.prompts, whole.completions, whole.failed) == (0.5, 3, 5, 1)
    assert whole.truncated == pytest.approx(1 / 3) and (told.prompts, told.completions) == (3, 6)
    odd = next(score for score in told.scores if (score.branch, score.reward) == ("odd", "total"))
    assert (odd.mean, odd.low, odd.truncated) == (1.0, None, 0.0)
    assert [score.branch for score in told.scores] == [None, None, "even", "even", "odd", "odd"]


def test_the_summary_reads_in_eighty_columns() -> None:
    text = render_inference(summary(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "6 completions of 3 prompts" in text and "2 written" in text and "12 tokens/s" in text


def test_without_rewards_there_is_no_table() -> None:
    bare = [completion(0).model_copy(update={"rewards": {}, "total": None})]
    told = summarize(bare, SETTINGS, out="out.jsonl", written=0, tokens_per_s=None)
    assert told.scores == [] and "interval" not in render_inference(told)
