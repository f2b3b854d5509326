"""Mutated configurations: each is legal or one short, printable line with an exit code of the table."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_autotune.commands.early import check_early
from grpo_autotune.config.schema import RunConfig, known_paths
from grpo_autotune.config.sources import profile_names, profiles_folder
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.errors import LONGEST, AutotuneError

SEEDS = {name: parse_yaml((profiles_folder() / f"{name}.yaml").read_text("utf-8"), name) for name in profile_names()}
KEYS = sorted({path.rpartition(".")[2] for path in known_paths()})

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["x" * 999, "\x1b[31m\x00", "auto", "./nowhere", "a:b", "1e-6", "\ud800", "~no/x", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), inner),
    max_leaves=4,
)


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every container in plain values with each of its keys or indices."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, inside in pairs for place in [(values, key), *places(inside)]]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 2))):
        held, key = draw(st.sampled_from(places(values) or [(values, "grpo")]))
        change = draw(st.sampled_from(["value", "remove", "rename", "add", "misspell"]))
        if change == "value" or isinstance(held, list):
            held[key] = draw(odd)
        elif change == "remove":
            held.pop(key)
        elif change == "misspell":
            held[str(key)[::-1] if draw(st.booleans()) else str(key)[1:] + "s"] = held.pop(key)
        else:
            held[draw(st.sampled_from(KEYS) | st.text(max_size=9))] = held.pop(key) if change == "rename" else draw(odd)
    return values


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(mutated())
def test_a_mutated_configuration_is_legal_or_one_line(values: dict[str, Any]) -> None:
    try:
        check_early(RunConfig.from_dict(values), {})
    except AutotuneError as error:
        line = str(error)
        assert len(line) <= LONGEST and line.isprintable() and error.exit_code in (1, 2, 3), line
