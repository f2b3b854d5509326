"""What may enter tuned.yaml: rewards on the same prompts, and how many would settle what is open."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import PromptReward
from grpo_autotune.search.noninferiority import LEAST_PROMPTS, judge_generations, judge_rewards, prompts_that_settle


def rows(means: np.ndarray, truncated: int = 0) -> list[PromptReward]:
    return [PromptReward(prompt=n, rewards=[float(m)] * 4, truncated=truncated) for n, m in enumerate(means)]


def judged(shift: float, spread: float, prompts: int, margin: float = 0.03, truncated: int = 0) -> Guard:
    """A change whose differences have exactly this mean and standard deviation."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=prompts)
    noise = (noise - noise.mean()) / noise.std(ddof=1) if prompts > 1 else noise
    own = rng.uniform(0.2, 0.8, prompts)
    after = rows(own + shift + spread * noise, truncated)
    return judge_rewards("data.image_size", 512, 256, rows(own), after, margin=margin, confidence=0.9)


def test_a_small_loss_that_is_well_measured_is_proven() -> None:
    found = judged(-0.01, 0.05, 100)
    assert found.proven and found.prompts_needed is None
    assert found.reward_difference == pytest.approx(-0.01)
    assert found.reward_low == pytest.approx(-0.01 - 1.2902 * 0.05 / 10, abs=1e-4)


def test_a_loss_beyond_the_margin_is_refused_for_good() -> None:
    found = judged(-0.2, 0.05, 50)
    assert not found.proven and found.prompts_needed is None and "falls by more" in found.why


def test_what_is_open_says_how_many_prompts_would_settle_it() -> None:
    found = judged(-0.01, 0.3, 30)
    assert not found.proven and found.prompts_needed is not None
    assert judged(-0.01, 0.3, found.prompts_needed).proven
    assert not judged(-0.01, 0.3, found.prompts_needed - 1).proven


def test_a_harm_that_is_open_is_settled_the_other_way() -> None:
    found = judged(-0.05, 0.3, 30)
    assert found.prompts_needed is not None
    assert "falls by more" in judged(-0.05, 0.3, found.prompts_needed).why


def test_prompts_that_settle_nothing() -> None:
    assert prompts_that_settle([-0.03, -0.03, -0.03], 0.03, 0.9) is None
    assert prompts_that_settle([0.0, 0.0, 0.1], 1.0, 0.9) == LEAST_PROMPTS


def test_too_few_prompts() -> None:
    found = judged(0.0, 0.01, 5)
    assert not found.proven and found.prompts_needed == LEAST_PROMPTS


def test_rewards_that_are_all_equal_show_nothing() -> None:
    same = rows(np.zeros(50))
    found = judge_rewards("data.image_size", 512, 256, same, same, margin=0.03, confidence=0.9)
    assert not found.proven and "nothing can be shown" in found.why


def test_equal_rewards_prompt_by_prompt_are_proven() -> None:
    own = np.linspace(0, 1, 40)
    found = judge_rewards("data.image_size", 512, 256, rows(own), rows(own), margin=0.03, confidence=0.9)
    assert found.proven and found.reward_low == found.reward_high == 0.0


def test_answers_that_are_cut_off_more_often_are_not_let_through() -> None:
    assert judged(0.0, 0.01, 50).proven
    found = judged(0.0, 0.01, 50, truncated=2)
    assert not found.proven and "cut off" in found.why
    assert "0.0% -> 50.0%; reward " in found.why, "the rewards are told, too"
    assert (found.truncated_before, found.truncated_after) == (0.0, 0.5)


def test_only_prompts_seen_on_both_sides_count() -> None:
    own = np.linspace(0, 1, 40)
    after = [*rows(own)[20:], PromptReward(prompt=99, rewards=[0.0], truncated=0)]
    found = judge_rewards("data.image_size", 512, 256, rows(own), after, margin=0.03, confidence=0.9)
    assert found.prompts == 20


def test_group_size_needs_more_than_noise() -> None:
    speed = Interval(1.5, 1.4, 1.6, 9)
    assert judge_generations(8, 4, Interval(0.9, 0.85, 0.95, 40), speed).proven
    unsure = judge_generations(8, 4, Interval(0.9, 0.5, 1.2, 4), speed)
    assert not unsure.proven and "not beyond noise" in unsure.why
    assert not judge_generations(8, 4, None, speed).proven
