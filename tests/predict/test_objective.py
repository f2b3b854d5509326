"""The score: what a group is worth, how many groups live, and how sure a median is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.predict.objective import (
    Interval,
    groups_per_step,
    living_of,
    living_ratio,
    median_interval,
    run_ratio,
    step_interval,
    useful_per_step,
)
from tests.support.sample_records import demo_record, token_facts, trainer_facts


def config(**grpo: Any) -> RunConfig:
    plain = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 10}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": "m"},
            "data": {"path": "d"},
            "rewards": [{"name": "r"}],
            "grpo": {k: v for k, v in {**plain, **grpo}.items() if v is not None},
        }
    )


def record_of(pass_rates: list[float], dead: int, size: int = 8) -> Any:
    tokens = token_facts(groups=len(pass_rates), dead_groups=dead, pass_rates=pass_rates)
    return demo_record(tokens=tokens, trainer=trainer_facts(num_generations=size))


def drawn(rate: float, groups: int, size: int) -> tuple[list[float], int]:
    counts = np.random.default_rng(1).binomial(size, rate, groups)
    return [count / size for count in counts], int(np.sum((counts == 0) | (counts == size)))


def test_a_pass_rate_of_18_percent_leaves_most_pairs_dead_and_most_groups_of_eight_alive() -> None:
    living = living_of(record_of(*drawn(0.18, 400, 8)))
    assert living is not None
    assert living.share(2) == pytest.approx(1 - 0.7048, abs=0.03)
    assert living.share(8) == pytest.approx(1 - 0.2045, abs=0.03)


def test_the_living_share_is_found_from_groups_of_another_size() -> None:
    living = living_of(record_of(*drawn(0.5, 400, 4), size=4))
    assert living is not None
    assert living.share(2) == pytest.approx(0.5, abs=0.04)
    assert living.share(16) > 0.98


def test_a_second_reward_keeps_groups_alive_that_the_first_leaves_dead() -> None:
    rates, dead = drawn(0.18, 400, 8)
    plain, helped = living_of(record_of(rates, dead)), living_of(record_of(rates, dead // 4))
    assert plain is not None and helped is not None
    assert helped.share(8) == pytest.approx(1 - dead / 4 / 400, abs=0.01)
    assert helped.share(2) > plain.share(2)


def test_rewards_that_are_no_pass_or_fail_live_as_often_at_every_size() -> None:
    living = living_of(record_of([0.0] * 20, 4))
    assert living is not None
    assert living.share(2) == living.share(16) == pytest.approx(0.8)


def test_without_any_spread_nothing_is_known_of_groups() -> None:
    assert living_of(record_of([0.0] * 20, 20)) is None
    assert living_of(demo_record(tokens=None)) is None
    assert living_ratio(record_of([0.0] * 20, 20), 8, 4, 0.9) is None


@pytest.mark.slow
def test_the_interval_of_the_living_ratio_narrows_with_groups() -> None:
    few, many = (living_ratio(record_of(*drawn(0.3, n, 8)), 8, 2, 0.9) for n in (8, 200))
    assert few is not None and many is not None
    truth = (1 - 0.7**2 - 0.3**2) / (1 - 0.7**8 - 0.3**8)
    assert many.low <= truth <= many.high
    assert many.high - many.low < few.high - few.low


def test_worth_of_a_step() -> None:
    assert groups_per_step(config()) == 2.0
    assert useful_per_step(config(), None, 0.0) == 14.0
    assert useful_per_step(config(num_generations=4), None, 0.0) == 12.0
    assert useful_per_step(config(num_iterations=2), None, 0.0) == 7.0
    masked = config(mask_truncated_completions=True)
    assert useful_per_step(masked, None, 0.25) == pytest.approx(2 * (8 * 0.75 - 1))
    assert useful_per_step(config(), None, 0.25) == 14.0


def test_a_run_of_so_many_steps_and_one_of_so_many_epochs() -> None:
    half_group = {"num_generations": 4}
    assert run_ratio(config(**half_group), config(), 0.8) == 0.8
    epochs = {"max_steps": None, "num_train_epochs": 1.0}
    assert run_ratio(config(**half_group, **epochs), config(**epochs), 0.8) == pytest.approx(0.4)


def test_medians_and_their_intervals() -> None:
    found = median_interval([1.0, 1.1, 5.0, 1.05, 0.95], 0.9)
    assert found.value == 1.05 and found.low >= 0.95 and found.n == 5
    assert median_interval([2.0], 0.9) == Interval(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no numbers"):
        median_interval([], 0.9)


def test_steps_that_generate_in_turns_count_as_a_cycle() -> None:
    assert step_interval([3.0, 1.0, 3.2, 1.2, 9.0], 2, 0.9).value == pytest.approx(2.1)
    assert step_interval([3.0], 2, 0.9).value == 3.0
