"""The reward functions of a configuration, wherever they come from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from grpo_autotune.config.reward_arguments import check_arguments
from grpo_autotune.config.schema import RewardItem, RunConfig
from grpo_autotune.registry import is_reference, resolve
from grpo_autotune.train.rewards.guard import guard

KEPT_BY_TRL = ("prompt", "completion")
"""Columns that no reward is given (`GRPOTrainer._calculate_rewards`, TRL 1.16)."""


def build_rewards(
    config: RunConfig, columns: Collection[str] | None = None
) -> tuple[list[Callable[..., Any]], list[float], list[str]]:
    """The reward functions of a configuration, guarded (see `rewards.guard`), their weights and their names, for data
    with these columns (None: not known).

    A sync function stays sync and an async one async; names are unique, a second `format` being `format_2`.

    Raises:
        ConfigError: A name is unknown, a parameter is none of the function's or is missing, or a column is.
    """
    functions: list[Callable[..., Any]] = []
    names: list[str] = []
    for place, item in enumerate(config.rewards):
        function = resolve("reward", item.name)
        _check(function, item, f"rewards[{place}]", columns)
        base = item.name.rpartition(":")[2].rpartition(".")[2]
        again = sum(name == base or re.fullmatch(rf"{re.escape(base)}_\d+", name) is not None for name in names)
        names.append(f"{base}_{again + 1}" if again else base)
        functions.append(guard(function, names[-1], item.params, alone=len(config.rewards) == 1))
    return functions, [item.weight for item in config.rewards], names


def _check(function: Callable[..., Any], item: RewardItem, where: str, columns: Collection[str] | None) -> None:
    """Check a function's arguments; a built-in one judges no rows besides, which tells of a wrong pattern or column."""
    given = None if columns is None else [name for name in columns if name not in KEPT_BY_TRL]
    with suppress(ValueError):  # a callable of another language shows no signature
        check_arguments(inspect.signature(function), item.params, where, given)
    if given is not None and not is_reference(item.name) and function.__module__.startswith(__package__):
        no_rows: dict[str, Any] = {name: [] for name in ("prompts", "completions", "completion_ids", *given)}
        function(**{**no_rows, **item.params})
