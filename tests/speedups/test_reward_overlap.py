"""Rewards beside the log-probs: the same values in the same order, errors where they were, seconds told truly."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import async_reward, make_trainer, spread_reward

from grpo_autotune.probe.probe import Probe  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.reward_overlap import beside  # isort: skip

WITH_REFERENCE = {"beta": 0.05}


async def judge(completions, answer, log_metric, **kwargs):
    await asyncio.sleep(0.3)
    log_metric("judged", float(len(completions)))
    return [len(text[0]["content"]) % 3 / 2 + int(digit) for text, digit in zip(completions, answer, strict=True)]


@beside
def on_a_thread(completions, **kwargs):
    time.sleep(0.3)
    assert threading.current_thread() is not threading.main_thread() or "plain" in THREADS
    return [None if index == 0 else 0.25 for index in range(len(completions))]


THREADS: set[str] = set()


@pytest.fixture(autouse=True)
def no_plain_thread():
    THREADS.clear()


def slow_passes(trainer):
    """Log-prob passes that take at least as long as the rewards."""
    inner = trainer._get_per_token_logps_and_entropies

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return inner(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = slow


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_training_is_the_same(tiny, tmp_path, text_rows, picture_rows, kind):
    def train(names):
        rows = picture_rows if kind.endswith("vl") else text_rows
        rewards = [spread_reward, judge, on_a_thread, async_reward]
        return trained(names, tiny(kind), rows, tmp_path, rewards=rewards, max_steps=5, **WITH_REFERENCE)

    THREADS.add("plain")
    plain, _ = train("none")
    THREADS.clear()
    mine, speedups = train("reward_overlap")
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) == 0.0
    assert speedups.facts()["reward_overlap"]["calls"] == 3 * 5
    for name in ("rewards/judge/mean", "rewards/on_a_thread/mean", "judged"):
        assert [line.get(name) for line in mine.state.log_history] == [
            line.get(name) for line in plain.state.log_history
        ]


async def writing(prompts, completions, completion_ids, answer, **kwargs):
    """Builds the judge's own conversation in what it was given, as a function may that TRL calls last."""
    for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
        ids.clear()
        prompt += [completion[0], {"role": "user", "content": "Is this right?"}]
        completion[0]["content"] += " Is it?"
    return [float(len(prompt)) + len(digit) for prompt, digit in zip(prompts, answer, strict=True)]


def test_an_early_function_may_write_into_what_it_is_given(tiny, tmp_path, picture_rows):
    def train(names):
        rewards = [spread_reward, writing]
        return trained(names, tiny("qwen3_vl"), picture_rows, tmp_path, rewards=rewards, **WITH_REFERENCE)

    plain, _ = train("none")
    for names in ("reward_overlap", ["reward_overlap", "images_once"]):
        mine, _ = train(names)
        assert rewards_of(mine) == rewards_of(plain)
        assert gap(weights_of(mine), weights_of(plain)) == 0.0


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize("reward", [judge, on_a_thread])
def test_hidden_and_exposed_seconds_are_told(tiny, tmp_path, text_rows, probe_first, reward):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=[reward], max_steps=2, **WITH_REFERENCE)
    slow_passes(trainer)
    probe = Probe(trainer) if probe_first else None
    speedups = speed_up(trainer, ["reward_overlap"])
    probe = probe or Probe(trainer)
    trainer.train()
    record = probe.record()
    probe.detach()
    row = next(row for row in record.timings.stages if row.name == "reward")
    assert row.hidden_s is not None and row.hidden_s >= 0.15
    exposed = sum(row.per_step_s) / len(row.per_step_s)
    facts = speedups.facts()["reward_overlap"]
    assert facts["hidden_s"] >= 0.3 and facts["busy_s"] >= 0.6
    assert exposed + row.hidden_s >= 0.29
    assert record.rewards[0].mean_s >= 0.3 and record.rewards[0].calls == 2


@pytest.mark.parametrize("is_async", [True, False])
def test_errors_surface_where_they_did(tiny, tmp_path, text_rows, is_async):
    async def failing(completions, **kwargs):
        raise LookupError("no such judge")

    @beside
    def failing_sync(completions, **kwargs):
        raise LookupError("no such judge")

    trainer = make_trainer(
        tiny("qwen3"), text_rows, tmp_path, rewards=[failing if is_async else failing_sync], **WITH_REFERENCE
    )
    before = list(trainer.reward_funcs)
    speedups = speed_up(trainer, ["reward_overlap"])
    with pytest.raises(LookupError, match="no such judge"):
        trainer.train()
    speedups.remove()
    assert trainer.reward_funcs == before


def test_a_wrong_number_of_rewards_is_trls_own_error(tiny, tmp_path, text_rows):
    async def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="returned 1 rewards"):
        trained("reward_overlap", tiny("qwen3"), text_rows, tmp_path, rewards=[short], **WITH_REFERENCE)


def test_what_was_started_is_cancelled_when_the_passes_fail(tiny, tmp_path, text_rows):
    ended = []

    async def long(completions, **kwargs):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return [0.0] * len(completions)

    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=[long], **WITH_REFERENCE)

    def broken(*args, **kwargs):
        time.sleep(0.1)
        raise MemoryError("out of memory")

    trainer._get_per_token_logps_and_entropies = broken
    speed_up(trainer, ["reward_overlap"])
    with pytest.raises(MemoryError):
        trainer.train()
    for _ in range(100):
        if ended:
            break
        time.sleep(0.02)
    assert ended == ["cancelled"]


@pytest.mark.parametrize(
    ("rewards", "grpo", "words"),
    [
        ([spread_reward], {"beta": 0.05}, "async"),
        ([judge], {"beta": 0.0}, "grpo.beta is 0"),
    ],
)
def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, rewards, grpo, words):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=rewards, **grpo)
    row = next(row for row in speed_up(trainer, ["reward_overlap"]).table() if row.name == "reward_overlap")
    assert not row.on and words in row.reason


def test_reuse_of_completions_has_a_pass_to_hide_behind(tiny, tmp_path, text_rows):
    trainer, speedups = trained(
        "reward_overlap", tiny("qwen3"), text_rows, tmp_path, rewards=[judge], num_iterations=2, max_steps=2
    )
    assert speedups.facts()["reward_overlap"]["calls"] >= 1 and trainer.state.global_step == 2


def test_the_guard_of_configured_rewards_keeps_the_permission():
    from grpo_autotune.train.rewards.guard import guard

    assert guard(on_a_thread, "mine", {}, alone=True).may_run_beside is True
    assert not hasattr(guard(spread_reward, "other", {}, alone=True), "may_run_beside")


def test_removal_leaves_nothing(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=[judge], **WITH_REFERENCE)
    before = patched(trainer)
    speed_up(trainer, ["reward_overlap"]).remove()
    assert patched(trainer) == before
