"""`grpo.advantages`, the one key of the `grpo` section that is not TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_autotune.config.foreign_keys import ForeignKey
from grpo_autotune.errors import ConfigError

OWN_KEYS = {"advantages": ForeignKey("advantages", frozenset({"'group'", "'rank'"}), "'group'")}


def check_advantages(grpo: Mapping[str, Any]) -> None:
    """ConfigError for ranks beside a scale that they leave no room for."""
    for key, default in (("multi_objective_aggregation", "sum_then_normalize"), ("scale_rewards", "group")):
        if grpo.get("advantages") == "rank" and grpo.get(key, default) not in (default, True):
            raise ConfigError("grpo.advantages rank leaves it no meaning", where=f"grpo.{key}", fix="Remove it.")
