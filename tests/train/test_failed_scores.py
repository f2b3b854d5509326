"""A score that could not be had moves no advantage, in TRL's own arithmetic, and can end a run that goes on later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from grpo_autotune.errors import ConfigError, RewardError  # noqa: E402
from grpo_autotune.train.rewards.build import build_rewards  # noqa: E402
from grpo_autotune.train.rewards.failures import attend, settle  # noqa: E402
from grpo_autotune.train.rewards.guard import FAILED  # noqa: E402
from tests.support.training import text_config  # noqa: E402


def test_what_takes_the_place_of_a_failed_score() -> None:
    rewards = torch.tensor(
        [[1, FAILED], [2, 0.5], [3, FAILED], [4, 0.7], [5, FAILED], [6, FAILED], [7, FAILED], [8, FAILED]],
        dtype=torch.float32,
    )
    whole, failed = settle(rewards, 4, {1: "group_mean"})
    mean = pytest.approx(0.6)
    assert whole[:4].tolist() == [[1, mean], [2, 0.5], [3, mean], [4, pytest.approx(0.7)]]
    assert whole[4:].isnan().all() and failed.sum(dim=0).tolist() == [0, 6]
    dropped, _ = settle(rewards, 4, {1: "drop"})
    assert dropped.isnan().all(dim=1).tolist() == [True, False, True, False] + [True] * 4
    alone, _ = settle(rewards, 1, {1: "group_mean"})  # an evaluation of one completion a prompt
    assert alone.isnan().all(dim=1).tolist() == dropped.isnan().all(dim=1).tolist()
    untouched, none = settle(rewards, 4, {})
    assert torch.equal(untouched, rewards) and not none.any()


class Scores:
    """An async reward that gives what it is told, with a policy as `build_rewards` attaches it."""

    def __init__(self, name: str, scores: list[float], on_failure: str | None = None) -> None:
        self.__name__, self.scores, self.on_failure = name, scores, on_failure

    async def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return self.scores[: len(completions)]


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [*[("sum_then_normalize", scale) for scale in ("group", "batch", "none")], ("normalize_then_sum", "group")],
)
def test_it_adds_nothing_to_an_advantage_of_trl(
    tiny: Callable[[str], Path], text_rows: Any, tmp_path: Path, aggregation: str, scale: str
) -> None:
    from tests.support.trainers import make_trainer

    judged, ruled = Scores("judge", [], "group_mean"), Scores("rule", [0.5] * 4 + [0.3] * 4)
    batch = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    how = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=[judged, ruled], **batch, **how)
    attend(trainer)
    inputs = next(iter(trainer.get_train_dataloader()))

    def advantages(scores: list[float]) -> Any:
        judged.scores = scores
        return trainer._generate_and_score_completions(inputs)["advantages"].tolist()

    def metric(name: str) -> float:
        return float(trainer._metrics["train"][name][-1])

    given = [0.9, FAILED, 0.2, 0.4, 0.7, 0.1, 0.6, 0.3]
    with_gap = advantages(given)
    assert with_gap[1] == pytest.approx(0, abs=1e-6) and min(map(abs, with_gap[:1] + with_gap[2:])) > 1e-3
    assert metric("rewards/judge/failed") == 1 / 8
    assert metric("rewards/judge/mean") == pytest.approx((2.0 + sum(given[4:])) / 8)
    ruled.scores = [0.1, 0.9, 0.4, 0.2, 0.3, 0.8, 0.5, 0.6]
    if scale == "none":  # what is left is the other reward's part
        assert advantages(given)[1] == pytest.approx(0.9 - 0.4, abs=1e-6)
    without = advantages([FAILED] * 4 + given[4:])
    assert without[:4] == [0.0] * 4 and all(without[4:])
    assert metric("rewards/judge/mean") == pytest.approx(sum(given[4:]) / 4)
    assert metric("reward") == pytest.approx((sum(given[4:]) + sum(ruled.scores[4:])) / 4)


async def moody(completions: list[Any], mood: str = "", **columns: Any) -> list[float]:
    """A user's function: it raises, or takes too long."""
    if mood == "hangs":
        await asyncio.sleep(60)
    if mood == "raises":
        raise ConnectionError("no route")
    return [1.0] * len(completions)


def test_a_users_async_function_has_the_same_guard(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def built(**item: Any) -> Any:
        changes = {"rewards": [{"name": f"{__name__}:moody", **item}]}
        return build_rewards(text_config(tmp_path, tmp_path, changes))[0][0]

    rows = {"prompts": ["p"] * 3, "completions": ["c"] * 3, "completion_ids": [[1]] * 3}
    plain, late = built(params={"mood": "raises"}), built(params={"mood": "hangs"}, deadline_s=0.05)
    broken = built(params={"mood": "raises"}, on_failure="stop")
    assert (plain.on_failure, late.on_failure, broken.on_failure) == (None, "group_mean", "stop")
    with pytest.raises(RewardError, match="reward moody: raised ConnectionError: no route"):
        asyncio.run(plain(**rows))
    assert asyncio.run(late(**rows)) == asyncio.run(broken(**rows)) == [FAILED] * 3
    assert late.remote.calls().failures == {"deadline": 3} and late.remote.calls().kind == "async"
    assert broken.remote.calls().failures == {"ConnectionError": 3}
    assert "reward moody: 3 of 3 scores failed (ConnectionError 3): no route" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ([{"name": "format", "deadline_s": 5.0}], r"rewards\[0\]\.deadline_s: format cannot have this key, .*async"),
        ([{"name": f"{__name__}:moody", "concurrency": 5}], r"rewards\[0\]\.concurrency: .*`judge` and `service`"),
        ([{"name": "format"}, {"name": "length", "label": "format"}], r"rewards\[1\]\.label: another reward"),
        ([{"name": "service", "params": {"url": "x"}}], r"rewards\[0\]\.params\.url: this is no address"),
        (
            [{"name": "service", "params": {"url": "http://me:sk-1@host"}}],
            r"params\.url: the address holds a key.*headers_env",
        ),
        (
            [{"name": "service", "params": {"url": "http://host/score?token=sk-1"}}],
            r"params\.url: the address holds a key.*headers_env",
        ),
        (
            [{"name": "service", "params": {"url": "http://x", "headers": {"Authorization": "Bearer sk-1"}}}],
            r"params\.headers\.Authorization: a key in it.*headers_env",
        ),
        (
            [{"name": "service", "params": {"url": "http://x", "headers_env": {"Authorization": "sk-1"}}}],
            r"params\.headers_env\.Authorization: this is no name of a variable",
        ),
        (
            [{"name": "service", "params": {"uri": "x"}}],
            r"rewards\[0\]\.params\.uri: .*no such parameter.*Nearest: url",
        ),
        ([{"name": "service"}], r"rewards\[0\]: the function needs url"),
        (
            [{"name": "service", "params": {"url": "http://x", "body": "{{ gold }}"}}],
            r"rewards\[0\]: the data has no column gold\. Columns: answer",
        ),
        (
            [{"name": "service", "on_failure": "drop", "params": {"url": "http://x", "on_failure": "stop"}}],
            "given twice",
        ),
    ],
)
def test_what_a_configuration_gets_wrong(tmp_path: Path, rewards: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        build_rewards(text_config(tmp_path, tmp_path, {"rewards": rewards}), ["prompt", "answer"])
    assert "sk-1" not in str(error.value)


def test_keys_of_calls_may_stand_in_params(tmp_path: Path) -> None:
    params = {"url": "http://x", "on_failure": "drop", "concurrency": 4}
    config = text_config(tmp_path, tmp_path, {"rewards": [{"name": "service", "label": "search", "params": params}]})
    assert config.from_yaml(config.to_yaml()) == config
    [function], _, names = build_rewards(config, ["prompt"])
    assert names == ["search"] == [function.__name__] and function.on_failure == "drop"
    assert function.remote.calls().concurrency == 4 and function.remote.calls().kind == "service"
