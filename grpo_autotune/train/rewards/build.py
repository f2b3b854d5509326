"""The reward functions of a configuration, wherever they come from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.registry import resolve
from grpo_autotune.train.rewards.guard import check_params, guard


def build_rewards(config: RunConfig) -> tuple[list[Callable[..., Any]], list[float], list[str]]:
    """The reward functions of a configuration, guarded (see `rewards.guard`), their weights and their names.

    A sync function stays sync and an async one async; names are unique, a second `format` being `format_2`.

    Raises:
        ConfigError: If a name is unknown, or a parameter is none of the function's.
    """
    functions: list[Callable[..., Any]] = []
    names: list[str] = []
    for place, item in enumerate(config.rewards):
        function = resolve("reward", item.name)
        check_params(function, item.params, f"rewards[{place}].params")
        base = item.name.rpartition(":")[2].rpartition(".")[2]
        again = sum(name == base or re.fullmatch(rf"{re.escape(base)}_\d+", name) is not None for name in names)
        names.append(f"{base}_{again + 1}" if again else base)
        functions.append(guard(function, names[-1], item.params, alone=len(config.rewards) == 1))
    return functions, [item.weight for item in config.rewards], names
