"""Search space: the legal combinations of knob values, and for any other the rule that it breaks.

Every knob that is searched by default, and any that the user names, is one axis; `search.knobs` puts its own values on
an axis or takes it away. A value that breaks a rule is refused before anything runs.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_autotune.config.foreign_keys import check_values, grpo_keys, peft_keys
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import TABLE, KnobContext, Knobs, context_of, knob, knobs_of
from grpo_autotune.knobs.apply import same_value, why_not
from grpo_autotune.knobs.table import check_keys
from grpo_autotune.knobs.values import as_users, unique
from grpo_autotune.records.probe import ProbeRecord

FOREIGN = {"grpo": grpo_keys, "peft": peft_keys}
"""Sections whose keys another package defines."""
MOST_EXPLAINED = 2000
"""Illegal combinations looked at to say which rule empties a space."""


@dataclass(frozen=True)
class Space:
    """The axes of a search, by knob in the order of the table."""

    values: dict[str, tuple[Any, ...]]  # of each knob; the user's own is first, unless `search.knobs` leaves it out
    baseline: Knobs  # the user's own values

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.values)


def space(config: RunConfig, machine: Machine, record: ProbeRecord | None = None) -> Space:
    """The axes of a search of this configuration, as its `search` section restricts and extends them; a probe of it
    tells the size of images that it leaves as they are. ConfigError where `search.knobs` or `search.accept` names what
    is no knob, gives a knob no value or one of a wrong type, or no combination is legal."""
    known, asked = context_of(config, machine, record), config.search.knobs
    check_keys(config.search)
    values = {row.key: _axis(known, row.key) for row in TABLE if _wanted(config, row.key)}
    values = {key: axis for key, axis in values.items() if axis and (len(axis) > 1 or key in asked)}
    axes = Space(values, knobs_of(config, values))
    if next(points(axes, config, machine), None) is None:
        what = f"no combination of these knobs is legal: {_emptied_by(axes, config, machine)}"
        raise ConfigError(what, where="search.knobs", fix="Give the knobs concerned other values, or leave them out")
    return axes


def points(axes: Space, config: RunConfig, machine: Machine) -> Iterator[Knobs]:
    """Every legal combination: the user's own first, then those with one change, with two, and so on."""
    return (point for point in _combinations(axes) if why_not(config, point, machine) is None)


def _combinations(axes: Space) -> Iterator[Knobs]:
    first = {key: axis[0] for key, axis in axes.values.items()}
    others = [key for key, axis in axes.values.items() if len(axis) > 1]
    for changes in range(len(others) + 1):
        for keys in itertools.combinations(others, changes):
            for picked in itertools.product(*(axes.values[key][1:] for key in keys)):
                yield {**first, **dict(zip(keys, picked, strict=True))}


def _wanted(config: RunConfig, key: str) -> bool:
    if key in config.search.knobs:
        return config.search.knobs[key] is not None
    return knob(key).searched or key in config.search.accept


def _axis(known: KnobContext, key: str) -> tuple[Any, ...]:
    """The values of one knob, the user's own first where it is among them."""
    row, asked = knob(key), known.config.search.knobs.get(key)
    if asked is None:
        return unique(row.values(known))
    if not asked:
        fix = "Give a list, or null to leave it out."
        raise ConfigError("a knob needs a value", where=f"search.knobs.{key}", fix=fix)
    try:
        for value in asked:
            _check_type(known.config, key, value)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"search.knobs.{key}", fix=error.fix) from error
    baseline = row.current(known.config)
    asked = [as_users(known, key, baseline, value) for value in asked]
    return unique(sorted(asked, key=lambda value: not same_value(value, baseline)))


def _check_type(config: RunConfig, key: str, value: Any) -> None:
    """Refuse a value that the configuration would refuse whatever the other knobs say: one of a wrong type."""
    section, _, name = key.rpartition(".")
    values = config.to_dict()
    if section == "vllm":
        RunConfig.from_dict({**values, "grpo": {"use_vllm": True}, "vllm": {name: value}})
    elif section in ("data", "model"):
        RunConfig.from_dict({**values, section: {**values.get(section, {}), name: value}})
    elif section in FOREIGN:
        check_values(section, {name: value}, FOREIGN[section]())
    elif not section and name in RunConfig.model_fields:
        RunConfig.from_dict({**values, name: value})


def _emptied_by(axes: Space, config: RunConfig, machine: Machine) -> str:
    """The rule that most combinations break."""
    reasons = Counter(
        reason
        for point in itertools.islice(_combinations(axes), MOST_EXPLAINED)
        if (reason := why_not(config, point, machine)) is not None
    )
    return reasons.most_common(1)[0][0].rstrip(".")
