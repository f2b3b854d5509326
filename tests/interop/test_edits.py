"""Edits of a user's text: the key set where its value is defined, all other characters as they were."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.interop.writing.edits import edits

SHELL = """#!/bin/bash
MICRO=10
GROUP=${GROUP:-5}  # of a prompt
ACTOR=(
    actor.micro=$MICRO
    "actor.name='old'"
    +rollout.n=${GROUP}
)
# actor.micro=3 \\
python3 -m trainer \\
    data.batch=${1:-512} \\
    "${ACTOR[@]}" \\
    data.other=$((2 * 4)) "$@"
"""
OPTIONS = """MAX_PIXELS=1003520 \\
swift rlhf \\
    --num_generations 8 \\
    --per-device-train-batch-size "$SIZE" --mode=colocate \\
    --note 'a b'
"""
PYTHON = """G = 8
trainer = GRPOTrainer(args=GRPOConfig(
    num_generations=G, beta=0.0,
    learning_rate=1e-6))
"""


def changed(text: str, key: str, value: Any, name: str, framework: str = "verl") -> list[str]:
    """Lines taken out and put in by the first edit."""
    edited = next(edits(Path(name), text, key, value, framework))
    return [line for line in difflib.ndiff(text.splitlines(), edited.splitlines()) if line[:1] in "+-"]


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        ("actor.micro", 4, ["- MICRO=10", "+ MICRO=4"]),
        (
            "rollout.n",
            8,
            ["- GROUP=${GROUP:-5}  # of a prompt", "+ GROUP=${GROUP:-8}  # of a prompt"],
        ),
        ("data.batch", 256, ["-     data.batch=${1:-512} \\", "+     data.batch=${1:-256} \\"]),
        ("actor.name", "new", ["-     \"actor.name='old'\"", "+     \"actor.name='new'\""]),
        ("data.other", 16, ['-     data.other=$((2 * 4)) "$@"', '+     data.other=16 "$@"']),
        ("+data.more", True, ['-     data.other=$((2 * 4)) "$@"', '+     data.other=$((2 * 4)) +data.more=True "$@"']),
    ],
)
def test_a_hydra_script_is_changed_where_the_value_is_defined(key: str, value: Any, lines: list[str]) -> None:
    assert changed(SHELL, key, value, "run.sh") == lines


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        ("num_generations", 4, ["-     --num_generations 8 \\", "+     --num_generations 4 \\"]),
        ("mode", "server", ['-     --per-device-train-batch-size "$SIZE" --mode=colocate \\',
                            '+     --per-device-train-batch-size "$SIZE" --mode=server \\']),
        ("beta", 0.1, ["-     --note 'a b'", "+     --note 'a b' \\", "+     --beta 0.1"]),
        ("per_device_train_batch_size", 2, ["-     --note 'a b'", "+     --note 'a b' \\",
                                            "+     --per_device_train_batch_size 2"]),
    ],
)  # fmt: skip
def test_options_are_changed_or_appended(key: str, value: Any, lines: list[str]) -> None:
    assert changed(OPTIONS, key, value, "run.sh", "ms-swift") == lines


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("n: &g 8  # G\nm: 3\n", "n: &g 4  # G\nm: 3\n"),
        ("m: &g 8\nn: *g   # G\n", "m: &g 8\nn: 4   # G\n"),
        ("a: {m: &g 8, n: *g, k: 1}\n", "a: {m: &g 8, n: 4, k: 1}\n"),
    ],
)
def test_anchors_stay_and_aliases_are_replaced(text: str, after: str) -> None:
    key = "a.n" if text.startswith("a") else "n"
    assert next(edits(Path("x.yaml"), text, key, 4, "trl")) == after


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        ("num_generations", 4, ["- G = 8", "+ G = 4"]),
        ("beta", 0.1, ["-     num_generations=G, beta=0.0,", "+     num_generations=G, beta=0.1,"]),
        ("max_steps", 3, ["+     max_steps=3,"]),
    ],
)
def test_arguments_of_a_script(key: str, value: Any, lines: list[str]) -> None:
    assert changed(PYTHON, key, value, "train.py", "trl") == lines


NAMES = st.sampled_from(["a", "b", "c"])
TREES = st.recursive(st.integers(0, 99), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=8)


@given(
    st.dictionaries(NAMES, TREES, min_size=1),
    st.lists(NAMES, min_size=1, max_size=3),
    st.booleans(),
    st.integers(100, 199),
)
def test_any_key_of_a_yaml_is_set_and_every_line_that_does_not_hold_it_kept(
    tree: dict[str, Any], path: list[str], flow: bool, value: int
) -> None:
    text = "# head\n" + yaml.safe_dump(tree, default_flow_style=flow).replace("\n", "   # kept\n", 1)
    here: Any = tree
    for name in path[:-1]:
        here = here.setdefault(name, {}) if isinstance(here, dict) else None
    if not isinstance(here, dict) or isinstance(here.get(path[-1]), dict):
        return
    here[path[-1]] = value
    edited = next(edits(Path("x.yaml"), text, ".".join(path), value, "easyr1"))
    assert yaml.safe_load(edited) == tree
    assert "# head" in edited and ("# kept" in edited or flow)
