"""Names resolve to functions, built-ins and third parties alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo_autotune import registry
from grpo_autotune.errors import ConfigError
from grpo_autotune.registry import is_reference, names, register, resolve

OF_TRL = [
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "cosine_scaled_reward",
    "think_format_reward",
    "repetition_penalty_reward",
    "soft_overlong_punishment",
]


def test_every_built_in_reward_resolves_to_the_function_of_its_name() -> None:
    assert names("reward") == sorted(
        [
            "exact_match",
            "numeric_match",
            "regex",
            "format",
            "choice_letter",
            "box_iou",
            "length",
            "judge",
            "service",
            *OF_TRL,
        ]
    )
    for name in names("reward"):
        assert resolve("reward", name).__name__.lower() == name


def test_every_built_in_reward_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert rows >= set(names("reward"))


def test_demo_data_and_model_are_registered_like_any_other() -> None:
    assert "digits" in names("dataset") and "demo" in names("model")


def test_every_reward_of_trl_is_registered() -> None:
    import trl.rewards

    assert {name.removeprefix("get_") for many in trl.rewards._import_structure.values() for name in many} == set(
        OF_TRL
    )


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward", "cosine_scaled_reward"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        resolve("reward", name)
    assert str(caught.value) == (
        f"{name}: this reward needs the package math-verify, which is not installed. Install it, or the extra `math`: "
        "pip install 'grpo-autotune[math]'."
    )


def test_speed_ups_are_classes_of_their_names_in_the_order_of_installation() -> None:
    assert names("speedup") == list(registry._TABLE["speedup"]) != sorted(names("speedup"))
    for name in names("speedup"):
        assert resolve("speedup", name)().name == name


def test_a_third_party_registers_by_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", {kind: dict(rows) for kind, rows in registry._TABLE.items()})

    @register("reward", "mine")
    def mine(completions: list[str], **columns: object) -> list[float]:
        return [1.0 for _ in completions]

    assert resolve("reward", "mine") is mine and "mine" in names("reward")
    register("reward", "mine")(mine)  # a module imported twice
    with pytest.raises(ConfigError, match="the reward exact_match is registered already"):
        register("reward", "exact_match")(mine)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "exact_mach",
            "exact_mach: there is no reward of this name. Nearest: exact_match. Known: accuracy_reward, box_iou",
        ),
        ("qqq", "Known: accuracy_reward, box_iou, choice_letter"),
        ("absent_module_xyz:f", "cannot import absent_module_xyz for this reward"),
        ("my_broken:f", "cannot import my_broken for this reward: invalid syntax (my_broken.py, line 2)"),
        ("my_rewards:absent", "my_rewards has no absent. Functions there: good."),
        ("my_rewards:NUMBER", "my_rewards:NUMBER: this is not a function"),
    ],
)
def test_a_name_that_cannot_be_resolved(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text("NUMBER = 3\ndef good(completions, **columns):\n    return [2.0]\n")
    (tmp_path / "my_broken.py").write_text("A = 1\nB = = 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    with pytest.raises(ConfigError) as caught:
        resolve("reward", name)
    assert expected in str(caught.value)
    assert resolve("reward", "my_rewards:good")(completions=["x"]) == [2.0]


@pytest.mark.parametrize("text", ["a:b", "a.b:c", "a.b:C.d"])
def test_references(text: str) -> None:
    assert is_reference(text)


@pytest.mark.parametrize("text", ["a", "a:", ":b", "a/b:c", "C:\\data", "a:b:c", "train[:5]:x", "owner/name"])
def test_what_is_no_reference(text: str) -> None:
    assert not is_reference(text)
