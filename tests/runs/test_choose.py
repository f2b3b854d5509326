"""Checkpoints ranked by what was logged."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.runs.choose import mode_of, own_choice, rank

ROWS = {
    10: {"eval_loss": 0.3, "eval_ppo_loss": 0.1, "eval_kl": 0.005, "adv_std": 0.9, "eval_reward": 0.50},
    20: {"eval_loss": 0.2, "eval_ppo_loss": 0.4, "eval_kl": 0.02, "adv_std": 0.7, "eval_reward": 0.60},
    30: {"eval_loss": 0.1, "eval_ppo_loss": 0.3, "eval_kl": 0.05, "adv_std": 0.6, "eval_reward": 0.66},
    40: {"eval_loss": 0.4, "eval_ppo_loss": 0.2, "eval_kl": 0.30, "adv_std": 0.8, "eval_reward": 0.70},
}
CI = {10: 0.05, 20: 0.05, 30: 0.05, 40: 0.06}
TIED = {step: {**row, "eval_reward_ci": CI[step]} for step, row in ROWS.items()}


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        ("val_loss", [30, 20, 10, 40]),
        ("ppo_loss", [10, 40, 30, 20]),
        ("kl", [30, 20, 10, 40]),
        ("adv_std", [30, 20, 40, 10]),
        ("reward", [40, 30, 20, 10]),
        ("eval_loss", [30, 20, 10, 40]),
    ],
)
def test_each_strategy(strategy: str, order: list[int]) -> None:
    assert list(rank(ROWS, strategy).values) == order


def test_ties_go_to_the_earliest() -> None:
    assert list(rank(TIED, "reward").values) == [30, 40, 20, 10]  # 0.66 is within 0.70 +- 0.06, and 0.60 is not
    of = "the earliest of 2 within the interval of the highest, 0.7 ± 0.06 at step 40"
    assert rank(TIED, "reward").why == f"eval_reward 0.66 ± 0.05 is {of}"
    assert rank({1: {"eval_loss": 0.5}, 2: {"eval_loss": 0.5}}, "val_loss").best == 1
    wide = {step: {**row, "eval_reward_ci": 0.1} for step, row in ROWS.items()}
    assert rank(wide, "kl").best == 20  # inside the band 20 and 30 are tied


def test_a_step_without_a_held_out_reward_is_not_taken_for_one_of_0() -> None:
    rows = {10: {"eval_kl": 0.05, "eval_reward": None}, 20: {"eval_kl": 0.05, "eval_reward": -1.0}}
    assert list(rank(rows, "kl").values) == [20, 10]


def test_a_band_that_no_step_is_inside() -> None:
    ranking = rank(ROWS, "kl", band=(0.1, 0.2))
    assert list(ranking.values) == [30, 20, 10, 40]
    assert (
        ranking.why
        == "KL 0.05 is nearest to the band of 0.1 to 0.2 nats per token; none with a held-out reward is inside"
    )


def test_the_other_end_can_be_asked_for() -> None:
    assert rank(ROWS, "val_loss", mode="max").best == 40
    assert rank(ROWS, "kl", mode="min").best == 10
    assert mode_of("entropy", "max") == "max"
    for name, mode in {"eval_loss": "min", "hard_loss": "min", "branch/solve/kl": "min", "eval_kl": "min",
                       "completions/clipped_ratio": "min", "reward": "max", "eval_rewards/format/mean": "max",
                       "branch/solve/reward": "max", "eval_accuracy": "max"}.items():  # fmt: skip
        assert mode_of(name) == mode, name
    for name in ("entropy", "reward_std", "completions/mean_length", "learning_rate"):
        with pytest.raises(ConfigError, match=rf"^{name}: its name does not tell .* Give mode: min or max"):
            mode_of(name)


def test_a_step_without_the_value_is_left_out() -> None:
    assert list(rank({**ROWS, 50: {"eval_loss": None, "eval_kl": 0.02}}, "val_loss").values) == [30, 20, 10, 40]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("rewrd", "rewrd: no such strategy; there are val_loss, ppo_loss, kl, adv_std, reward. Nearest: reward."),
        ("nonsense", "nonsense: no such strategy; .* Or a logged name: adv_std, eval_kl, .*eval_reward."),
    ],
)
def test_a_name_that_was_not_logged(name: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        rank(ROWS, name)


def test_a_strategy_whose_value_was_not_logged() -> None:
    with pytest.raises(ConfigError, match=r"^kl: this run logged no eval_kl\. There are eval_loss"):
        rank({1: {"eval_loss": 0.5, "step": 1}}, "kl")


def test_what_was_trained_on_is_said() -> None:
    assert not rank(ROWS, "val_loss").notes
    assert "adv_std is of the rows that were trained on" in rank(ROWS, "adv_std").notes[0]
    assert "eval_reward is what training raises" in rank(ROWS, "reward").notes[0]
    rows = {1: {"eval_rewards/judge/mean": 0.5}}
    assert rank(rows, "rewards/judge/mean").notes and not rank(rows, "rewards/judge/mean", untrained=["judge"]).notes
    flat = {1: {"eval_ppo_loss": 1e-9}, 2: {"eval_ppo_loss": -1e-9}}
    assert "its order says nothing" in rank(flat, "ppo_loss").notes[0]


@pytest.mark.parametrize(
    ("grpo", "choice"),
    [
        ({}, ("reward", "auto")),
        ({"metric_for_best_model": "eval_kl"}, ("kl", "max")),  # transformers takes the highest of all but losses
        ({"metric_for_best_model": "two_loss"}, ("two_loss", "min")),
        ({"metric_for_best_model": "kl", "greater_is_better": False}, ("kl", "min")),
        ({"load_best_model_at_end": True}, ("loss", "min")),
    ],
)
def test_a_run_that_leaves_the_choice_to_transformers(grpo: dict[str, Any], choice: tuple[str, str]) -> None:
    values = {"model": {"name_or_path": "m"}, "data": {"path": "digits"}, "rewards": [{"name": "exact_match"}]}
    assert own_choice(RunConfig.from_dict({**values, "grpo": {"beta": 0.1, **grpo}})) == choice
