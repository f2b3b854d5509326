"""The legal combinations of knob values, and for any other the rule that it breaks.

Every knob that is searched by default, and any that the user names, is one axis; `search.knobs` puts its own values on
an axis or takes it away. What breaks a rule is told before anything runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_autotune.config.foreign_keys import check_values, grpo_keys, peft_keys
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import TABLE, Given, Knobs, given, knob
from grpo_autotune.knobs.apply import same_value, why_not
from grpo_autotune.knobs.values import unique
from grpo_autotune.records.probe import ProbeRecord

MOST_EXPLAINED = 2000
"""Illegal combinations looked at to say which rule empties a space."""


@dataclass(frozen=True)
class Space:
    """The axes of a search.

    Attributes:
        keys: The knobs, in the order of the table.
        values: The values of each; the user's own is first, unless `search.knobs` leaves it out.
        own: The user's own values.
    """

    keys: tuple[str, ...]
    values: dict[str, tuple[Any, ...]]
    own: Knobs

    @property
    def size(self) -> int:
        """Combinations, the illegal ones included."""
        count = 1
        for key in self.keys:
            count *= len(self.values[key])
        return count


def space(config: RunConfig, machine: Machine, record: ProbeRecord | None = None) -> Space:
    """The knobs that may be turned and their values.

    Args:
        config: The user's configuration; its `search` section restricts and extends.
        machine: What is there.
        record: A probe of `config`; it tells the size of images that the configuration leaves as they are.

    Raises:
        ConfigError: `search.knobs` or `search.accept` names what is no knob, gives a knob no value or one of a wrong
            type, or no combination is legal.
    """
    known, asked = given(config, machine, record), config.search.knobs
    for key in asked:
        _known(key, "search.knobs")
    for key in config.search.accept:
        _known(key, "search.accept")
    values = {row.key: _axis(known, row.key) for row in TABLE if _wanted(config, row.key)}
    values = {key: axis for key, axis in values.items() if axis and (len(axis) > 1 or key in asked)}
    keys = tuple(values)
    found = Space(keys, values, {key: knob(key).own(config) for key in keys})
    if next(points(found, config, machine), None) is None:
        raise ConfigError(
            f"no combination of these knobs is legal: {_emptied_by(found, config, machine)}",
            where="search.knobs",
            fix="Give the knobs concerned other values, or leave them out",
        )
    return found


def points(found: Space, config: RunConfig, machine: Machine) -> Iterator[Knobs]:
    """Every legal combination: the user's own first, then those with one change, with two, and so on."""
    for point in _combinations(found):
        if why_not(config, point, machine) is None:
            yield point


def _combinations(found: Space) -> Iterator[Knobs]:
    first = {key: found.values[key][0] for key in found.keys}
    others = [key for key in found.keys if len(found.values[key]) > 1]
    for changes in range(len(others) + 1):
        for keys in itertools.combinations(others, changes):
            for picked in itertools.product(*(found.values[key][1:] for key in keys)):
                yield {**first, **dict(zip(keys, picked, strict=True))}


def _wanted(config: RunConfig, key: str) -> bool:
    if key in config.search.knobs:
        return config.search.knobs[key] is not None
    return knob(key).searched or key in config.search.accept


def _axis(known: Given, key: str) -> tuple[Any, ...]:
    """The values of one knob, the user's own first where it is among them."""
    row, asked = knob(key), known.config.search.knobs.get(key)
    if asked is None:
        return unique(row.values(known))
    if not asked:
        raise ConfigError(
            "a knob needs a value", where=f"search.knobs.{key}", fix="Give a list, or null to leave it be."
        )
    for value in asked:
        _accepted(known.config, key, value)
    own = row.own(known.config)
    return unique(sorted(asked, key=lambda value: not same_value(value, own)))


def _known(key: str, where: str) -> None:
    try:
        knob(key)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{where}.{key}", fix=error.fix) from error


def _accepted(config: RunConfig, key: str, value: Any) -> None:
    """Refuse a value that the configuration would refuse whatever the other knobs say: one of a wrong type."""
    section, _, name = key.rpartition(".")
    try:
        if section == "vllm":
            RunConfig.from_dict({**config.to_dict(), "grpo": {"use_vllm": True}, "vllm": {name: value}})
        elif section in ("data", "model"):
            RunConfig.from_dict({**config.to_dict(), section: {**config.to_dict().get(section, {}), name: value}})
        elif section == "grpo":
            check_values("grpo", {name: value}, grpo_keys())
        elif section == "peft":
            check_values("peft", {name: value}, peft_keys())
        elif not section and name in RunConfig.model_fields:
            RunConfig.from_dict({**config.to_dict(), name: value})
    except ConfigError as error:
        raise ConfigError(error.what, where=f"search.knobs.{key}", fix=error.fix) from error


def _emptied_by(found: Space, config: RunConfig, machine: Machine) -> str:
    """The rule that most combinations break."""
    reasons = Counter(
        reason
        for point in itertools.islice(_combinations(found), MOST_EXPLAINED)
        if (reason := why_not(config, point, machine)) is not None
    )
    return reasons.most_common(1)[0][0].rstrip(".")
