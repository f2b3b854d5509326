"""Rewards are checked in their source text, before anything is imported: names, parameters, and TRL's arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.commands.early import check_rewards
from grpo_autotune.config.reward_arguments import check_arguments
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.registry import names, source_of

MODULE = """
import torch_that_is_not_here
from elsewhere import imported
def plain(completions, scale=1.0, **columns): ...
async def later(completions, *, target, **columns): ...
def closed(completions, answer): ...
@decorated
def dressed(x): ...
def twice(x): ...
twice = dressed(twice)
class Judge: ...
def either(completions): ...
if imported:
    def either(completions, scale, **columns): ...
"""


@pytest.fixture
def rewards_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    (tmp_path / "judges_in_text.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_judges.py").write_text("def f(:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def build(name: str, **params: Any) -> RunConfig:
        rewards = [{"name": name, "params": params}]
        return RunConfig.from_dict({"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": rewards})

    return build


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        (
            "length",
            {},
            "rewards[0]: the function needs target_tokens and max_tokens. Write params: {target_tokens: ...",
        ),
        ("length", {"target_tokens": 5}, "rewards[0]: the function needs max_tokens. Write params: {max_tokens: ...}."),
        (
            "length",
            {"target_token": 5},
            "rewards[0].params.target_token: the function has no such parameter. Nearest: t",
        ),
        (
            "length",
            {"target_tokens": "5", "max_tokens": 9},
            "rewards[0].params.target_tokens: '5' is not accepted. Acc",
        ),
        ("regex", {"pattern": 3}, "rewards[0].params.pattern: 3 is not accepted. Accepted: text."),
        ("soft_overlong_punishment", {}, "rewards[0]: the function needs max_completion_len and soft_punish_cache."),
        ("exact_mach", {}, "exact_mach: there is no reward of this name. Nearest: exact_match."),
        ("no_such_module:f", {}, "no_such_module:f: cannot import no_such_module for this reward: No module named"),
        ("broken_judges:f", {}, "broken_judges:f: cannot import broken_judges for this reward: invalid syntax"),
        (
            "judges_in_text:palin",
            {},
            "judges_in_text:palin: judges_in_text has no palin. Functions there: plain, later",
        ),
        (
            "judges_in_text:plain",
            {"scael": 2},
            "rewards[0].params.scael: the function has no such parameter. Nearest: sc",
        ),
        (
            "judges_in_text:closed",
            {},
            "rewards[0]: the function takes no prompts and no completion_ids, which TRL gives",
        ),
    ],
)
def test_a_mistake_is_seen_in_the_text(
    rewards_of: Callable[..., RunConfig], name: str, params: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rewards(rewards_of(name, **params))
    assert str(caught.value).startswith(expected)
    assert "judges_in_text" not in sys.modules


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("length", {"target_tokens": 5, "max_tokens": 9}),
        ("judges_in_text:plain", {"scale": 2}),
        ("judges_in_text:later", {}),  # the data may have such a column
        ("judges_in_text:dressed", {"anything": 1}),
        ("judges_in_text:twice", {"anything": 1}),
        ("judges_in_text:Judge", {}),
        ("judges_in_text:either", {"scale": 1}),
        ("judges_in_text:imported", {}),
    ],
)
def test_what_the_text_does_not_refute_passes(
    rewards_of: Callable[..., RunConfig], name: str, params: dict[str, Any]
) -> None:
    check_rewards(rewards_of(name, **params))


def test_every_built_in_reward_is_readable() -> None:
    assert all(source_of("reward", name) is not None for name in names("reward"))


def test_arguments_against_the_datas_columns() -> None:
    def open_one(completions: list[str], gold: list[str], **columns: Any) -> None: ...

    def closed(
        prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, log_extra: Any, log_metric: Any
    ) -> None: ...

    check_arguments(inspect.signature(open_one), {}, "rewards[0]", ["prompt", "gold"])
    check_arguments(inspect.signature(open_one), {"gold": ["a"]}, "rewards[0]", ["prompt"])
    check_arguments(inspect.signature(closed), {}, "rewards[0]", [])
    with pytest.raises(
        ConfigError, match=r"needs gold\. Write params: \{gold: \.\.\.\}\. Columns of the data: answer\."
    ):
        check_arguments(inspect.signature(open_one), {}, "rewards[0]", ["answer"])
    with pytest.raises(ConfigError, match=r"takes no answer, which TRL gives to every reward\. Add \*\*kwargs"):
        check_arguments(inspect.signature(closed), {}, "rewards[0]", ["answer"])


def test_a_module_in_folders_without_init_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder called like a module of Python's own, too: the parents are looked up, and not imported."""
    folder = tmp_path / "without_init" / "time"
    folder.mkdir(parents=True)
    (folder / "rewards.py").write_text("def mine(completions, **kwargs):\n    return [0.0]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    definition = source_of("reward", "without_init.time.rewards:mine")
    assert definition is not None and definition.name == "mine"
    assert "without_init" not in sys.modules
    with pytest.raises(ConfigError, match=r"cannot import without_init\.time\.nowhere"):
        source_of("reward", "without_init.time.nowhere:mine")
