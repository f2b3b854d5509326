"""The reward functions of a configuration, wherever they come from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from grpo_autotune.config.reward_arguments import check_arguments
from grpo_autotune.config.schema import RewardItem, RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.registry import is_reference, resolve
from grpo_autotune.seams.layers import is_async
from grpo_autotune.train.rewards.guard import blame, guard
from grpo_autotune.train.rewards.remote.counts import Remote
from grpo_autotune.train.rewards.remote.own import OwnReward

KEPT_BY_TRL = ("prompt", "completion")
"""Columns that no reward is given (`GRPOTrainer._calculate_rewards`, TRL 1.16)."""


def build_rewards(
    config: RunConfig, columns: Collection[str] | None = None
) -> tuple[list[Callable[..., Any]], list[float], list[str]]:
    """The reward functions of a configuration, guarded (see `rewards.guard`), their weights and their names, for data
    with these columns (None: not known).

    A sync function stays sync and an async one async; names are unique, a second `format` being `format_2`. A class is
    called with `params` once, and what it makes is the function. Async functions carry `remote`, a `Remote`, and those
    whose scores may fail `on_failure`.

    Raises:
        ConfigError: A name is unknown, a parameter is none of the function's or is missing, or a column is.
    """
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
        functions.append(_guarded(function, item, names[-1], where, columns, alone=len(config.rewards) == 1))
    return functions, [item.weight for item in config.rewards], names


def _guarded(
    function: Callable[..., Any],
    item: RewardItem,
    name: str,
    where: str,
    columns: Collection[str] | None,
    *,
    alone: bool,
) -> Callable[..., Any]:
    params = item.params
    if inspect.isclass(function):
        function, params = _made(function, item, name, where), {}
    _check(function, item, params, where, columns)
    keys = [key for key in ("concurrency", "deadline_s", "on_failure") if getattr(item, key) is not None]
    limits = ("deadline_s", "on_failure") if is_async(function) else ()
    limits = (*limits, "concurrency") if isinstance(function, Remote) else limits
    for key in keys:
        if key not in limits:
            kinds = "`judge` and `service`" if key == "concurrency" else "async functions"
            raise ConfigError(f"{name} cannot have this key, which is for {kinds}", where=f"{where}.{key}")
    if not limits:
        return guard(function, name, params, alone=alone)
    if isinstance(function, Remote):
        function.set_up(name, where, item.concurrency, item.deadline_s)
        remote, attributes = function, {}
    else:
        remote = OwnReward(function, name, item.deadline_s, may_fail=bool(keys))
        attributes = getattr(function, "__dict__", {})
    guarded = guard(remote.__call__, name, params, alone=alone)
    on_failure = item.on_failure or ("group_mean" if keys or isinstance(function, Remote) else None)
    guarded.__dict__.update(attributes, remote=remote, on_failure=on_failure)
    return guarded


def _made(cls: Callable[..., Any], item: RewardItem, name: str, where: str) -> Callable[..., Any]:
    """What a class makes of `params`."""
    check_arguments(inspect.signature(cls), item.params, where, (), made=True)
    try:
        with blame(name):
            made: Callable[..., Any] = cls(**item.params)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{where}.params.{error.where}", fix=error.fix) from error
    return made


def _check(
    function: Callable[..., Any], item: RewardItem, params: dict[str, Any], where: str, columns: Collection[str] | None
) -> None:
    """Check a function's arguments; a built-in one judges no rows besides, which tells of a wrong pattern or column."""
    given = None if columns is None else [name for name in columns if name not in KEPT_BY_TRL]
    with suppress(ValueError):  # a callable of another language shows no signature
        check_arguments(inspect.signature(function), params, where, given)
    if given is None:
        return
    missing = sorted(getattr(function, "columns", set()) - {*given, *KEPT_BY_TRL})
    if missing and isinstance(function, Remote):
        raise ConfigError(f"the data has no column {missing[0]}", where=where, fix=f"Columns: {', '.join(given)}.")
    if not is_reference(item.name) and not is_async(function) and function.__module__.startswith(__package__):
        no_rows: dict[str, Any] = {name: [] for name in ("prompts", "completions", "completion_ids", *given)}
        function(**{**no_rows, **params})
