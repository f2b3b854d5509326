"""Keys of `grpo` that are judged against what TRL will do with them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
from trl import GRPOConfig

from grpo_autotune.config.sections.checkpoints import CheckpointsSection
from grpo_autotune.errors import ConfigError
from grpo_autotune.train.arguments import check_best_metric
from grpo_autotune.train.rewards import builtin


def check(metric: str, *modules: ModuleType, **keys: Any) -> None:
    common = {"output_dir": "out", "use_cpu": True, "bf16": False, "eval_strategy": "steps"}
    args = GRPOConfig(**{**common, "metric_for_best_model": metric, **keys})
    check_best_metric(args, ["exact_match", "format"], modules or [builtin])


@pytest.mark.parametrize("metric", ["reward", "eval_reward", "loss", "rewards/format/mean", "completions/mean_length"])
def test_a_metric_of_an_evaluation_passes(metric: str) -> None:
    check(metric)


@pytest.mark.parametrize(
    ("metric", "fix"),
    [
        ("rewards", "Nearest: reward."),
        ("eval_rewards/format/men", "Nearest: rewards/format/mean."),
        ("kl", "There are "),
    ],
)
def test_a_metric_that_no_evaluation_reports(metric: str, fix: str) -> None:
    line = rf"^grpo\.metric_for_best_model: no evaluation reports {metric.removeprefix('eval_')}\. {fix}"
    with pytest.raises(ConfigError, match=line) as told:
        check(metric)
    assert len(str(told.value)) < 400
    check(metric, eval_strategy="no")


def test_what_a_reference_or_a_reward_reports_passes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check("kl", beta=0.04)
    (tmp_path / "own_judges.py").write_text("def judge(completions, log_metric=None, **k):\n    return [0.5]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check("my_metric", builtin, importlib.import_module("own_judges"))


def test_held_out_sets_have_losses_of_their_own() -> None:
    args = GRPOConfig(output_dir="out", use_cpu=True, bf16=False, eval_strategy="steps", metric_for_best_model="a_loss")
    check_best_metric(args, ["format"], [builtin], ["a", "b"])
    args.metric_for_best_model = "eval_loss"
    with pytest.raises(ConfigError, match="no evaluation reports loss"):
        check_best_metric(args, ["format"], [builtin], ["a", "b"])


@pytest.mark.parametrize(
    ("choose", "line"),
    [
        (
            "rewards/format/men",
            "checkpoints.choose: no evaluation reports rewards/format/men. Nearest: rewards/format/mean",
        ),
        ("entropy", "entropy: its name does not tell whether low or high is good"),
    ],
)
def test_a_choice_that_no_evaluation_reports(choose: str, line: str) -> None:
    args = GRPOConfig(output_dir="out", use_cpu=True, bf16=False, eval_strategy="steps")
    with pytest.raises(ConfigError) as told:
        check_best_metric(args, ["format"], [builtin], checkpoints=CheckpointsSection(choose=choose))
    assert str(told.value).startswith(line)
    for good in ("rewards/format/mean", "eval_loss", "adv_std", "val_loss", "reward"):
        check_best_metric(args, ["format"], [builtin], checkpoints=CheckpointsSection(choose=good))
    check_best_metric(args, ["format"], [builtin], checkpoints=CheckpointsSection(choose="entropy", mode="max"))
