"""A name -> a function: built-ins and third parties come through the same door.

A built-in is a row that names its function as text, `package.module:function`, so this module imports nothing of what
it names. In a configuration any such text stands for a function too; the current folder is searched first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_autotune.errors import ConfigError, nearest_hint

Kind = Literal["reward", "dataset", "model", "speedup"]
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

_REWARDS, _DEMO = "grpo_autotune.train.rewards.builtin", "grpo_autotune.demo"

_TABLE: dict[str, dict[str, str | Function]] = {
    "reward": {
        "exact_match": f"{_REWARDS}:exact_match",
        "numeric_match": f"{_REWARDS}:numeric_match",
        "regex": f"{_REWARDS}:regex",
        "format": f"{_REWARDS}:format",
        "choice_letter": f"{_REWARDS}:choice_letter",
        "box_iou": f"{_REWARDS}:box_iou",
        "length": f"{_REWARDS}:length",
    },
    "dataset": {"digits": f"{_DEMO}:digits_dataset"},
    "model": {"demo": f"{_DEMO}:demo_model_path"},
    "speedup": {},  # those that come with the package: speedups/table.py
}


def register(kind: Kind, name: str) -> Callable[[F], F]:
    """Decorator that makes a function known by name.

    Args:
        kind: `reward`: TRL's reward signature, parameters as keywords; `dataset`: `fn(split, **params)` ->
            `datasets.Dataset`; `model`: `fn()` -> a folder that `from_pretrained` reads; `speedup`: a class, as
            `speedups.base.SpeedUp`.
        name: What a configuration calls it.

    Raises:
        ConfigError: If another function has that name.
    """

    def add(function: F) -> F:
        old = _TABLE[kind].get(name)
        if old is not None and old is not function:
            raise ConfigError(f"the {kind} {name} is registered already", fix="Choose another name.")
        _TABLE[kind][name] = function
        return function

    return add


def names(kind: Kind) -> list[str]:
    """Registered names of a kind."""
    return sorted(_TABLE[kind])


def is_reference(text: str) -> bool:
    """Whether a text has the form `package.module:function`."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def resolve(kind: Kind, name: str) -> Function:
    """The function behind a registered name or a `package.module:function` text.

    Raises:
        ConfigError: If there is none; lists the known names and the nearest.
    """
    entry = _TABLE[kind].get(name, name)
    if not isinstance(entry, str):
        return entry
    if is_reference(entry):
        return _load(kind, entry)
    raise ConfigError(
        f"there is no {kind} of this name",
        where=name,
        fix=f"{nearest_hint(name, names(kind))} Known: {', '.join(names(kind))}, or package.module:function.",
    )


def _load(kind: str, reference: str) -> Function:
    module_name, _, attribute = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"cannot import {module_name} for this {kind}: {error}",
            where=reference,
            fix=f"Modules are looked for in {folder}.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {attribute}", where=reference, fix=_functions_of(module_name))
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError("this is not a function", where=reference)
    function: Function = found
    return function


def _functions_of(module_name: str) -> str:
    public = [
        name for name, value in vars(sys.modules[module_name]).items() if callable(value) and not name.startswith("_")
    ]
    return f"Functions there: {', '.join(public)}." if public else ""
