"""Configurations in a report: keys with their values, and a tuned one as a diff against the user's."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_autotune.config.batch import of_other_processes
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import with_knobs

SECRET = re.compile(r"(?i)(?:token|(?:api|access|private)_?key|secret|passw(?:or)?d|credential|authorization)s?$")
"""Ends of the names of keys whose text nobody is shown."""


def without_secrets(value: Any, key: str = "") -> Any:
    """The value of a key with "(not shown)" for each secret in it, however deep."""
    if isinstance(value, Mapping):
        return {name: without_secrets(inner, str(name)) for name, inner in value.items()}
    shown = "(not shown)" if value and isinstance(value, str) and SECRET.search(key) else value
    return [without_secrets(inner, key) for inner in value] if isinstance(value, list) else shown


@of_other_processes()
def settings(values: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Key paths and values of a stored configuration, first those that are `set`, then each `default`."""
    values = without_secrets(values)
    try:
        changed = dict(_flat(RunConfig.from_dict(values).to_dict()))
    except ConfigError:  # of an older version, where it cannot be told
        return [(key, value, "") for key, value in _flat(values)]
    rows = [(key, value, "set" if key in changed else "default") for key, value in _flat(values)]
    return sorted(rows, key=lambda row: row[2], reverse=True)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that differ, with both values as text; those of sections that no step depends on are left out."""
    before, after = ({key: str(value) for key, value in _flat(without_secrets(side))} for side in (old, new))
    keys = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    keys = [key for key in keys if key.partition(".")[0] not in ("output", "receipt", "search")]
    return {key: [before.get(key, "unset"), after.get(key, "unset")] for key in keys}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


@of_other_processes()
def tuned_diff(values: Mapping[str, Any], knobs: Mapping[str, Any]) -> list[str]:
    """The configuration with these knobs as a unified diff against that without; empty where a key is not known."""
    try:
        before = RunConfig.from_dict(without_secrets(values))
        after = with_knobs(before, dict(knobs))
    except ConfigError:
        return []
    old, new = (config.model_copy(update={"receipt": None}).to_yaml().splitlines() for config in (before, after))
    return list(difflib.unified_diff(old, new, "yours", "tuned", lineterm=""))
