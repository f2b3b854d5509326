"""The branches section: what is legal survives a round trip, and each mistake is one line that names its key."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import judged_branches, start_weights
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs.context import context_of
from grpo_autotune.knobs.table import knob

TWO: dict[str, Any] = {
    "column": "task",
    "fair": {"beta": 0.1, "kl_band": [0.02, 0.06], "rewards": ["judge_fair"]},
    "fact": {"beta": 0.3, "rewards": ["format"], "eval": {"greedy": True, "samples": 20}},
}


def config(branches: dict[str, Any], **sections: Any) -> RunConfig:
    rewards = [{"name": "exact_match", "label": "judge_fair"}, {"name": "format"}, {"name": "length", "weight": 0.1}]
    values = {"model": {"name_or_path": "demo"}, "data": {"path": "digits", "eval_split": "test"}, "rewards": rewards}
    return RunConfig.from_dict({**values, "branches": branches, **sections})


def test_two_branches_survive_yaml_and_share_what_nobody_lists() -> None:
    two = config(TWO)
    assert RunConfig.from_yaml(two.to_yaml()) == two
    assert two.branches is not None and list(two.branches.by_name) == ["fair", "fact"]
    assert start_weights(two.branches, two.grpo) == {"fair": 0.1, "fact": 0.3}
    assert judged_branches(two.branches, two.rewards) == [{"fair"}, {"fact"}, {"fair", "fact"}]


def test_one_branch_takes_its_weight_from_grpo_and_keeps_it() -> None:
    """The search does not try a run without a KL term then."""
    one = config({"all": {"kl_band": [0.02, 0.06]}, "control": None}, grpo={"beta": 0.04})
    assert one.branches is not None and one.branches.control is None
    assert start_weights(one.branches, one.grpo) == {"all": 0.04}
    assert knob("grpo.beta").values(context_of(one)) == (0.04,)
    assert RunConfig.from_yaml(one.to_yaml()) == one


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({"fair": {"beta": 0}}, "branches.fair.beta", "above 0"),
        ({"fair": {}}, "branches.fair.beta", "above 0"),
        ({"fair": {"beta": 1, "betta": 1}}, "branches.fair.betta", "branches.fair.beta"),
        ({"fair": {"beta": 1, "eval": {"greedi": True}}}, "branches.fair.eval.greedi", "Known here: greedy, samples."),
        ({"fair": {"beta": 1, "kl_band": [0.2, 0.1]}}, "branches.fair.kl_band", "low < high"),
        ({"fair": {"beta": 1, "kl_band": [0.2]}}, "branches.fair.kl_band", "low < high"),
        ({"fair": {"beta": 1, "rewards": ["jugde_fair"]}}, "branches.fair.rewards", "Nearest: judge_fair"),
        ({"fair": {"beta": 1, "rewards": ["exact_match"]}}, "branches.fair.rewards", "There are"),
        ({"fair": {"beta": 1, "share": 0.5}, "fact": {"beta": 1, "share": 0.75}}, "branches.*.share", "1.25 together"),
        ({"fact": {"beta": 1, "share": 1.0}}, "branches.*.share", "1 of 2"),
        ({"fact": None}, "branches.fact", "mapping"),
        ({"a/b": {"beta": 1}}, "branches.a/b", "no slash"),
        ({1: {"beta": 1}}, "branches.1", "mapping"),
        ({"column": None}, "branches.column", "several branches"),
        ({"colum": "task"}, "branches.colum", "Accepted: column, control"),
        ({"control": {"every": 0}}, "branches.control.every", "at least 1"),
        ({"control": {"factor": 1.0}}, "branches.control.factor", "1.0"),
        ({"control": {"evry": 3}}, "branches.control.evry", "branches.control.every"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(change: dict[Any, Any], where: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config({**TWO, **change})
    assert str(error.value).startswith(f"{where}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("branches", "sections", "where"),
    [
        ({}, {}, "branches"),
        (TWO, {"grpo": {"beta": 0.0}}, "grpo.beta"),
        (TWO, {"grpo": {"remove_unused_columns": True}}, "grpo.remove_unused_columns"),
        (TWO, {"data": {"path": "digits"}}, "branches.fact.eval"),
        (TWO, {"grpo": {"advantages": "ranks"}}, "grpo.advantages"),
        (TWO, {"grpo": {"advantages": "rank", "scale_rewards": "batch"}}, "grpo.scale_rewards"),
        ({"column": "t", "a": {"beta": 1, "rewards": ["judge_fair", "format", "length"]}, "b": {"beta": 1}}, {},
         "branches.b.rewards"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit(branches: dict[str, Any], sections: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(branches, **sections)
    assert str(error.value).startswith(f"{where}: ")
