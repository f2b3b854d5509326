"""Errors of a configuration in one line: the key path, the value, and what is accepted or nearest."""

from collections.abc import Sequence

from pydantic import ValidationError

from grpo_autotune.config.foreign_keys import wrong_type
from grpo_autotune.config.renamed_keys import fate
from grpo_autotune.errors import ConfigError, nearest_path

ACCEPTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "at least {min_length} item",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
}
"""Pydantic's error type -> what may be written instead."""

MOST_LISTED = 12

HOSTS = ("search", "output", "receipt", "monitors")
"""Sections whose keys are meant nowhere else: `grpo.steps` is not `search.steps`."""


def from_validation(error: ValidationError, known: Sequence[str]) -> ConfigError:
    """The first problem that `model_validate` found, unknown keys before wrong values (the value may be wrong because
    its key is). `known` is every legal key path, `rewards.weight` standing for any item of the list."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown_key(problem["loc"], known)
    if problem["type"] == "missing":
        return ConfigError("this key is required and is missing", where=path)
    words = ACCEPTED.get(problem["type"])
    accepted = words.format(**problem.get("ctx", {})) if words else problem["msg"].removeprefix("Input should be ")
    return wrong_type(path, problem["input"], accepted)


def unknown_key(loc: Sequence[str | int], known: Sequence[str]) -> ConfigError:
    """An unknown key: what became of it, or the known one that was probably meant, or those of its section."""
    keys = [str(part) for part in loc if not isinstance(part, int)]
    if advice := fate(keys[-1]):
        return ConfigError("unknown key", where=_path(loc), fix=advice)
    section = ".".join(keys[:-1])
    meant = [path for path in known if not section or path.partition(".")[0] not in HOSTS or path.startswith(section)]
    near = nearest_path(".".join(keys), meant)
    if near:
        return ConfigError("unknown key", where=_path(loc), fix=f"Nearest known key: {near}.")
    beside = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    more = f" and {len(beside) - MOST_LISTED} more" if len(beside) > MOST_LISTED else ""
    return ConfigError("unknown key", where=_path(loc), fix=f"Known here: {', '.join(beside[:MOST_LISTED])}{more}.")


def _path(loc: Sequence[str | int]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
