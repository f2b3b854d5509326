"""Functions by name: rewards, data sets, models and speed-ups, built in or registered by third parties.

A built-in is a row that names its function as text, `package.module:function`, so this module imports nothing of what
it names; and nothing that is named there imports this module. In a configuration any such text stands for a function
too; the current folder is searched first. `source_of` reads a function's definition without importing it.
"""

import ast
import importlib
import importlib.util
import sys
import tokenize
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from grpo_autotune.errors import ConfigError, nearest_hint

Kind = Literal["reward", "dataset", "model", "speedup"]
Function = Callable[..., Any]
Definition = ast.FunctionDef | ast.AsyncFunctionDef
F = TypeVar("F", bound=Function)


class Builtin(NamedTuple):
    """A function that comes with the package."""

    reference: str  # `package.module:function`, imported when it is asked for
    needs: tuple[str, str] | None = None  # package that it needs beside the required ones, and the extra that brings it


_REWARDS, _TRL_REWARDS = "grpo_autotune.train.rewards.builtin", "grpo_autotune.train.rewards.from_trl"
_DEMO = "grpo_autotune.demo"
_MATH = ("math-verify", "math")
_REWARD_NAMES = ("exact_match", "numeric_match", "regex", "format", "choice_letter", "box_iou", "length")
_TRL_MATH_NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "cosine_scaled_reward")
_TRL_NAMES = ("think_format_reward", "repetition_penalty_reward", "soft_overlong_punishment")

_TABLE: dict[Kind, dict[str, Builtin | Function]] = {
    "reward": {
        **{name: Builtin(f"{_REWARDS}:{name}") for name in _REWARD_NAMES},
        "judge": Builtin("grpo_autotune.train.rewards.remote.judge:Judge", ("openai", "judge")),
        "service": Builtin("grpo_autotune.train.rewards.remote.service:Service", ("tenacity", "judge")),
        **{name: Builtin(f"{_TRL_REWARDS}:{name}", _MATH) for name in _TRL_MATH_NAMES},
        **{name: Builtin(f"{_TRL_REWARDS}:{name}") for name in _TRL_NAMES},
    },
    "dataset": {"digits": Builtin(f"{_DEMO}:digits_dataset")},
    "model": {"demo": Builtin(f"{_DEMO}:demo_model_path")},
    "speedup": {  # in the order in which they are installed
        "shared_prefix": Builtin("grpo_autotune.speedups.shared_prefix.speedup:SharedPrefix"),
        "shared_prefill": Builtin("grpo_autotune.speedups.generation.shared_prefill:SharedPrefill"),
        "merge_for_generation": Builtin("grpo_autotune.speedups.generation.merge_for_generation:MergeForGeneration"),
        "images_once": Builtin("grpo_autotune.speedups.images.images_once:ImagesOnce"),
        "vision_cache": Builtin("grpo_autotune.speedups.images.vision_cache:VisionCache"),
        "length_sort": Builtin("grpo_autotune.speedups.batches.length_sort:LengthSort"),
        "skip_dead": Builtin("grpo_autotune.speedups.batches.skip_dead:SkipDead"),
        "merge_passes": Builtin("grpo_autotune.speedups.batches.merge_passes:MergePasses"),
        "patch_embed": Builtin("grpo_autotune.speedups.images.patch_embed:PatchEmbed"),
        "lora_input": Builtin("grpo_autotune.speedups.lora_input:LoraInput"),
        "fused_lora": Builtin("grpo_autotune.speedups.fused_lora:FusedLora"),
        "reward_overlap": Builtin("grpo_autotune.speedups.reward_overlap:RewardOverlap"),
    },
}


def register(kind: Kind, name: str) -> Callable[[F], F]:
    """Decorator that makes a function known by a configuration's name for it; ConfigError where another one has that.

    A `reward` has TRL's signature, parameters as keywords; a `dataset` is `fn(split, **params)` -> `datasets.Dataset`,
    a `model` `fn()` -> a folder that `from_pretrained` reads, a `speedup` a class, as `speedups.base.SpeedUp`."""

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
    """The function behind a registered name or a `package.module:function` text; ConfigError where there is none, with
    the known names and the nearest, or a package that it needs is not installed."""
    entry = _entry(kind, name)
    return _load(kind, entry.reference) if isinstance(entry, Builtin) else entry


def source_of(kind: Kind, name: str) -> Definition | None:
    """The definition of a function by name, of a class that of its constructor, read in its source text: nothing is
    imported. None where the text alone cannot tell: a decorated or an imported function, a class that inherits its
    constructor. ConfigError as `resolve`, where the text shows it."""
    entry = _entry(kind, name)
    if not isinstance(entry, Builtin):
        return None
    module_name, _, attribute = entry.reference.partition(":")
    text = _source_text(module_name, kind, entry.reference)
    if text is None:
        return None
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise _no_import(module_name, kind, entry.reference, error) from error
    functions = {node.name: node for node in tree.body if isinstance(node, Definition)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.decorator_list:
            inits = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            functions |= dict.fromkeys([node.name], inits[0]) if inits else {}
    defined = [node.name for node in ast.walk(tree) if isinstance(node, Definition | ast.ClassDef)]
    first = attribute.partition(".")[0]
    if first not in text and "import *" not in text and "__getattr__" not in text:
        raise ConfigError(f"{module_name} has no {attribute}", where=entry.reference, fix=_listed(list(functions)))
    definition = functions.get(attribute)
    is_sole = defined.count(attribute) == 1 and attribute not in _assigned(tree)
    return definition if definition is not None and is_sole and not definition.decorator_list else None


def _entry(kind: Kind, name: str) -> Builtin | Function:
    """The entry of a name or a reference, its packages looked for; ConfigError as `resolve`."""
    entry = _TABLE[kind].get(name)
    if entry is None and is_reference(name):
        entry = Builtin(name)
    if entry is None:
        fix = f"{nearest_hint(name, names(kind))} Known: {', '.join(names(kind))}, or package.module:function."
        raise ConfigError(f"there is no {kind} of this name", where=name, fix=fix)
    package, extra = (entry.needs if isinstance(entry, Builtin) else None) or ("", "")
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        fix = f"Install it, or the extra `{extra}`: pip install 'grpo-autotune[{extra}]'."
        raise ConfigError(f"this {kind} needs the package {package}, which is not installed", where=name, fix=fix)
    return entry


def _load(kind: str, reference: str) -> Function:
    module_name, _, attribute = reference.partition(":")
    _look_here()
    try:
        value: Any = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise _no_import(module_name, kind, reference, error) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name, member in vars(sys.modules[module_name]).items() if callable(member)]
            raise ConfigError(f"{module_name} has no {attribute}", where=reference, fix=_listed(public))
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError("this is not a function", where=reference)
    function: Function = value
    return function


def _look_here() -> None:
    """Let imports look in the current folder first."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _source_text(module_name: str, kind: str, reference: str) -> str | None:
    """The text of a module that is not imported for it; None where it has no text. ConfigError without such a
    module."""
    if module_name in sys.modules and getattr(sys.modules[module_name], "__file__", None) is None:
        return None
    _look_here()
    importlib.invalidate_caches()
    parts, path, origin = module_name.split("."), None, None
    for depth in range(len(parts)):
        name = ".".join(parts[: depth + 1])
        spec = _spec(name, path)
        if spec is None:
            raise _no_import(module_name, kind, reference, ModuleNotFoundError(f"No module named {name!r}"))
        path, origin = list(spec.submodule_search_locations or ()), spec.origin
    if origin is None or not origin.endswith(".py"):
        return None
    with suppress(OSError, UnicodeDecodeError, SyntaxError), tokenize.open(origin) as file:
        return file.read()
    return None  # inside an archive, or in an encoding that the import will complain of


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    try:
        return next((spec for spec in specs if spec is not None), None)
    except KeyError:  # a folder without __init__.py looks for its parent among the imported
        return PathFinder.find_spec(name.rpartition(".")[2], path)


def _assigned(tree: ast.Module) -> set[str]:
    """Names that a module binds by an assignment or an import, wherever it does."""
    nodes = list(ast.walk(tree))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = (node.names for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    return stored | {alias.asname or alias.name for aliases in imports for alias in aliases}


def _no_import(module_name: str, kind: str, reference: str, error: ImportError | SyntaxError) -> ConfigError:
    fix = f"Modules are looked for in {Path.cwd()}."
    return ConfigError(f"cannot import {module_name} for this {kind}: {error}", where=reference, fix=fix)


def _listed(functions: list[str]) -> str:
    public = [name for name in functions if not name.startswith("_")]
    return f"Functions there: {', '.join(public)}." if public else ""
