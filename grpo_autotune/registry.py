"""Functions by name: rewards, data sets, models and speed-ups, built in or registered by third parties.

A built-in is a row that names its function as text, `package.module:function`, so this module imports nothing of what
it names; and nothing that is named there imports this module. In a configuration any such text stands for a function
too; the current folder is searched first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from grpo_autotune.errors import ConfigError, nearest_hint

Kind = Literal["reward", "dataset", "model", "speedup"]
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class Builtin(NamedTuple):
    """A function that comes with the package.

    Attributes:
        reference: `package.module:function`, imported when it is asked for.
        needs: Package on the index that it needs beside the required ones, and the extra that brings it.
    """

    reference: str
    needs: tuple[str, str] | None = None


_REWARDS, _TRL_REWARDS = "grpo_autotune.train.rewards.builtin", "grpo_autotune.train.rewards.from_trl"
_DEMO = "grpo_autotune.demo"
_MATH = ("math-verify", "math")

_TABLE: dict[Kind, dict[str, Builtin | Function]] = {
    "reward": {
        "exact_match": Builtin(f"{_REWARDS}:exact_match"),
        "numeric_match": Builtin(f"{_REWARDS}:numeric_match"),
        "regex": Builtin(f"{_REWARDS}:regex"),
        "format": Builtin(f"{_REWARDS}:format"),
        "choice_letter": Builtin(f"{_REWARDS}:choice_letter"),
        "box_iou": Builtin(f"{_REWARDS}:box_iou"),
        "length": Builtin(f"{_REWARDS}:length"),
        "accuracy_reward": Builtin(f"{_TRL_REWARDS}:accuracy_reward", _MATH),
        "reasoning_accuracy_reward": Builtin(f"{_TRL_REWARDS}:reasoning_accuracy_reward", _MATH),
        "cosine_scaled_reward": Builtin(f"{_TRL_REWARDS}:cosine_scaled_reward", _MATH),
        "think_format_reward": Builtin(f"{_TRL_REWARDS}:think_format_reward"),
        "repetition_penalty_reward": Builtin(f"{_TRL_REWARDS}:repetition_penalty_reward"),
        "soft_overlong_punishment": Builtin(f"{_TRL_REWARDS}:soft_overlong_punishment"),
    },
    "dataset": {"digits": Builtin(f"{_DEMO}:digits_dataset")},
    "model": {"demo": Builtin(f"{_DEMO}:demo_model_path")},
    "speedup": {  # in the order in which they are installed
        "shared_prefix": Builtin("grpo_autotune.speedups.shared_prefix.speedup:SharedPrefix"),
        "shared_prefill": Builtin("grpo_autotune.speedups.generation.shared_prefill:SharedPrefill"),
        "images_once": Builtin("grpo_autotune.speedups.images.images_once:ImagesOnce"),
        "vision_cache": Builtin("grpo_autotune.speedups.images.vision_cache:VisionCache"),
        "length_sort": Builtin("grpo_autotune.speedups.batches.length_sort:LengthSort"),
        "skip_dead": Builtin("grpo_autotune.speedups.batches.skip_dead:SkipDead"),
        "merge_passes": Builtin("grpo_autotune.speedups.batches.merge_passes:MergePasses"),
        "patch_embed": Builtin("grpo_autotune.speedups.images.patch_embed:PatchEmbed"),
        "lora_input": Builtin("grpo_autotune.speedups.lora_input:LoraInput"),
        "reward_overlap": Builtin("grpo_autotune.speedups.reward_overlap:RewardOverlap"),
    },
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
    """Registered names of a kind: speed-ups in the order in which they are installed, all others sorted."""
    return list(_TABLE[kind]) if kind == "speedup" else sorted(_TABLE[kind])


def is_reference(text: str) -> bool:
    """Return whether a text has the form `package.module:function`."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def resolve(kind: Kind, name: str) -> Function:
    """The function behind a registered name or a `package.module:function` text.

    Raises:
        ConfigError: There is none; lists the known names and the nearest. Or a package that it needs is not installed.
    """
    entry = _TABLE[kind].get(name)
    if entry is None and is_reference(name):
        entry = Builtin(name)
    if isinstance(entry, Builtin):
        _check_installed(kind, name, entry)
        return _load(kind, entry.reference)
    if entry is not None:
        return entry
    raise ConfigError(
        f"there is no {kind} of this name",
        where=name,
        fix=f"{nearest_hint(name, names(kind))} Known: {', '.join(names(kind))}, or package.module:function.",
    )


def _check_installed(kind: Kind, name: str, entry: Builtin) -> None:
    if entry.needs is not None and importlib.util.find_spec(entry.needs[0].replace("-", "_")) is None:
        package, extra = entry.needs
        raise ConfigError(
            f"this {kind} needs the package {package}, which is not installed",
            where=name,
            fix=f"Install it, or the extra `{extra}`: pip install 'grpo-autotune[{extra}]'.",
        )


def _load(kind: str, reference: str) -> Function:
    module_name, _, attribute = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"cannot import {module_name} for this {kind}: {error}",
            where=reference,
            fix=f"Modules are looked for in {folder}.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{module_name} has no {attribute}", where=reference, fix=_functions_of(module_name))
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError("this is not a function", where=reference)
    function: Function = value
    return function


def _functions_of(module_name: str) -> str:
    public = [
        name for name, value in vars(sys.modules[module_name]).items() if callable(value) and not name.startswith("_")
    ]
    return f"Functions there: {', '.join(public)}." if public else ""
