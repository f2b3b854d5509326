"""What is wrong with a configuration, in one line: the key path, the value, and what is accepted or nearest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import ValidationError

from grpo_autotune.config.foreign_keys import wrong_type
from grpo_autotune.errors import ConfigError

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
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
}
"""Pydantic's error type -> what may be written instead."""


def from_validation(error: ValidationError, known: Sequence[str]) -> ConfigError:
    """The first problem pydantic found, unknown keys before wrong values (the value may be wrong because its key is).

    Args:
        error: What `model_validate` raised.
        known: Every legal key path, `rewards.weight` standing for any item of the list.
    """
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
    """An unknown key, with the nearest known one: the same name in another section, else a similar name beside it."""
    keys = [str(part) for part in loc if not isinstance(part, int)]
    section, name = ".".join(keys[:-1]), keys[-1]
    same_name = [path for path in known if path.rpartition(".")[2] == name]
    beside = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == section}
    near = same_name or [beside[match] for match in difflib.get_close_matches(name, beside, n=1, cutoff=0.5)]
    if not near:
        paths = {path.rpartition(".")[2]: path for path in known}
        near = [paths[match] for match in difflib.get_close_matches(name, paths, n=1)]
    if near:
        fix = f"Nearest known key: {near[0]}."
    else:
        fix = f"Known here: {', '.join(list(beside)[:20])}{', ...' if len(beside) > 20 else ''}."
    return ConfigError("unknown key", where=_path(loc), fix=fix)


def _path(loc: Sequence[str | int]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
