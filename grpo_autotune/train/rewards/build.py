"""The reward functions of a configuration, wherever they come from."""

import inspect
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from grpo_autotune.config.reward_arguments import check_arguments
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.rewards import CALL_KEYS, RewardItem
from grpo_autotune.errors import ConfigError
from grpo_autotune.registry import is_reference, resolve
from grpo_autotune.seams.layers import is_async
from grpo_autotune.train.rewards.guard import blame, guard
from grpo_autotune.train.rewards.remote.timed import OwnReward, Remote

KEPT_BY_TRL = ("prompt", "completion")
"""Columns that no reward is given (`GRPOTrainer._calculate_rewards`, TRL 1.16)."""


def build_rewards(
    config: RunConfig, columns: Collection[str] | None = None, *, to_learn: bool = True
) -> tuple[list[Callable[..., Any]], list[float], list[str]]:
    """The reward functions of a configuration, guarded (see `rewards.guard`), their weights and their names, for data
    with these columns (None: not known). Where nothing is `to_learn` from them, they may give None alone.

    A sync function stays sync and an async one async; names are unique, a second `format` being `format_2`. A class is
    called with `params` once, and what it makes is the function. Async functions carry `remote`, a `Remote`, and those
    whose scores may fail `on_failure`. ConfigError where a name is unknown, a parameter is none of the function's or is
    missing, or a column is."""
    functions: list[Callable[..., Any]] = []
    names: list[str] = []
    for place, item in enumerate(config.rewards):
        where = f"rewards[{place}]"
        function = resolve("reward", item.name)
        base = item.label or item.name.rpartition(":")[2].rpartition(".")[2]
        again = sum(name == base or re.fullmatch(rf"{re.escape(base)}_\d+", name) is not None for name in names)
        if item.label in names:
            raise ConfigError(f"another reward is called {item.label}", where=f"{where}.label")
        names.append(base if item.label or not again else f"{base}_{again + 1}")
        if inspect.isclass(function):
            function, item = _made(function, item, names[-1], where), item.model_copy(update={"params": {}})
        _check(function, item, where, columns)
        functions.append(_guarded(function, item, names[-1], where, alone=len(config.rewards) == 1, to_learn=to_learn))
    return functions, [item.weight for item in config.rewards], names


def _guarded(function: Callable[..., Any], item: RewardItem, name: str, where: str, **how: bool) -> Callable[..., Any]:
    keys = [key for key in CALL_KEYS if getattr(item, key) is not None]
    for key in keys:
        kinds, is_one = "async functions", is_async(function)
        if key == "concurrency":
            kinds, is_one = "`judge` and `service`", isinstance(function, Remote)
        if not is_one:
            raise ConfigError(f"{name} cannot have this key, which is for {kinds}", where=f"{where}.{key}")
    if not is_async(function):
        return guard(function, name, item.params, **how)
    remote = function if isinstance(function, Remote) else OwnReward(function, may_fail=bool(keys))
    remote.set_up(name, where, item.concurrency, item.deadline_s)
    guarded = guard(remote.__call__, name, item.params, **how)
    guarded.__dict__.update({} if remote is function else getattr(function, "__dict__", {}))
    on_failure = item.on_failure or ("group_mean" if keys or remote is function else None)
    guarded.__dict__.update(remote=remote, on_failure=on_failure)
    return guarded


def _made(cls: Callable[..., Any], item: RewardItem, name: str, where: str) -> Callable[..., Any]:
    """The reward that a class makes of `params`."""
    check_arguments(inspect.signature(cls), item.params, where, (), made=True)
    try:
        with blame(name):
            made: Callable[..., Any] = cls(**item.params)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{where}.params.{error.where}", fix=error.fix) from error
    return made


def _check(function: Callable[..., Any], item: RewardItem, where: str, columns: Collection[str] | None) -> None:
    """Check a function's arguments; a built-in one judges no rows besides, which tells of a wrong pattern or column."""
    given = None if columns is None else [name for name in columns if name not in KEPT_BY_TRL]
    with suppress(ValueError):  # a callable of another language shows no signature
        check_arguments(inspect.signature(function), item.params, where, given)
    if given is None:
        return
    missing = sorted(getattr(function, "columns", set()) - {*given, *KEPT_BY_TRL})
    if missing and isinstance(function, Remote):
        raise ConfigError(f"the data has no column {missing[0]}", where=where, fix=f"Columns: {', '.join(given)}.")
    if not is_reference(item.name) and not is_async(function) and function.__module__.startswith(__package__):
        no_rows: dict[str, Any] = {name: [] for name in ("prompts", "completions", "completion_ids", *given)}
        function(**{**no_rows, **item.params})
