"""Rows of branches: their check, an epoch in given shares, and reward functions that see their branches' rows alone."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import Branches, judged_branches
from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.errors import ConfigError, DataError, nearest_hint
from grpo_autotune.seams.layers import is_async


def divided(
    config: RunConfig, rows: datasets.Dataset, held_out: Any, functions: Sequence[Any], say: Callable[[str], None]
) -> tuple[datasets.Dataset, Any, list[Any]]:
    """Rows to train on, held-out rows that are evaluated, and reward functions, as the branches of a configuration have
    them. ConfigError where the data lacks the column, or rows of a branch; DataError for a value that is no branch."""
    branches = config.branches
    assert branches is not None
    held_out = evaluated(branches, held_out)
    judges = judges_of(branches, config.rewards, functions)
    of_rows = branch_of_rows(branches, rows, config.data.path)
    counts = Counter(of_rows)
    for name in branches.by_name.keys() - counts:
        fix = "Add rows, or remove it."
        raise ConfigError(f"{config.data.path} has no row of this branch", where=f"branches.{name}", fix=fix)
    shares = {name: branch.share for name, branch in branches.by_name.items() if branch.share is not None}
    if not shares:
        return rows, held_out, judges
    order = in_shares(of_rows, shares, int(config.grpo.get("seed", 0)))
    drawn = Counter(of_rows[row] for row in order)
    say(f"prompts of an epoch: {', '.join(f'{drawn[name]} of {name} ({counts[name]} rows)' for name in shares)}")
    return rows.select(order), held_out, judges


def judges_of(branches: Branches, rewards: Sequence[RewardItem], functions: Sequence[Any]) -> list[Any]:
    """Reward functions, each of which judges the rows of its own branches alone."""
    judged = judged_branches(branches, rewards)
    return [
        function if len(names) == len(branches.by_name) else judging(function, str(branches.column), names)
        for function, names in zip(functions, judged, strict=True)
    ]


def evaluated(branches: Branches, held_out: Any, where: str = "held-out data") -> Any:
    """The first `samples` rows of each branch of a held-out data set, of several by name, or of None."""
    if not isinstance(held_out, datasets.Dataset):
        return held_out and {name: evaluated(branches, rows, f"{where} {name}") for name, rows in held_out.items()}
    names = np.array(branch_of_rows(branches, held_out, where))
    parts = [np.flatnonzero(names == name)[: branch.samples] for name, branch in branches.by_name.items()]
    return held_out.select(np.sort(np.concatenate(parts)))


def branch_of_rows(branches: Branches, rows: datasets.Dataset, where: str) -> list[str]:
    """The branch of each row of a data set, which `where` names in messages; raises as `divided`."""
    if (column := branches.column) is None:
        return [*branches.by_name] * len(rows)
    if column not in rows.column_names:
        fix = nearest_hint(column, rows.column_names, f"Columns: {', '.join(rows.column_names)}.")
        raise ConfigError(f"{where} has no column {column}", where="branches.column", fix=fix)
    names = [str(value) for value in rows[column][:]]
    for row, name in enumerate(names):
        if name not in branches.by_name:
            fix = nearest_hint(name, branches.by_name, f"There are {', '.join(branches.by_name)}.")
            raise DataError(f"{column} is {name!r}, which is no branch", where=f"{where}, row {row}", fix=fix)
    return names


def in_shares(names: Sequence[str], shares: Mapping[str, float], seed: int) -> list[int]:
    """Rows of an epoch with branches in their shares, to the nearest row, in a drawn order: each row at least once, and
    a branch's rows as often as each other, or (drawn) once more."""
    of_rows, rng = np.array(names), np.random.default_rng(seed)
    size = max(math.ceil(names.count(name) / share) for name, share in shares.items())
    parts = [np.resize(rng.permutation(np.flatnonzero(of_rows == name)), round(size * shares[name])) for name in shares]
    order: list[int] = rng.permutation(np.concatenate(parts)).tolist()
    return order


def judging(function: Callable[..., Any], column: str, names: Collection[str]) -> Callable[..., Any]:
    """A reward function, sync or async as it was, that is called with the rows of some branches, and not at all where a
    batch has none; other rows get None, in what it logs as well."""

    def split(batch: dict[str, Any]) -> tuple[dict[str, Any] | None, Callable[[Sequence[Any]], list[Any]]]:
        size, part = len(batch[column]), dict(batch)
        rows = [row for row, value in enumerate(batch[column]) if str(value) in names]
        for name, value in batch.items():
            if isinstance(value, list) and len(value) == size:
                part[name] = [value[row] for row in rows]

        def whole(values: Sequence[Any]) -> list[Any]:
            by_row = dict(zip(rows, values, strict=True))
            return [by_row.get(row) for row in range(size)]

        if log := batch.get("log_extra"):
            part["log_extra"] = lambda column, values: log(column, whole(values))
        return part if rows else None, whole

    @functools.wraps(function)
    async def awaited(**batch: Any) -> list[Any]:
        part, whole = split(batch)
        return whole(await function(**part) if part else [])

    @functools.wraps(function)
    def called(**batch: Any) -> list[Any]:
        part, whole = split(batch)
        return whole(function(**part) if part else [])

    return awaited if is_async(function) else called
