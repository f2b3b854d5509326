"""Hooks around the import of a module that nobody has imported yet: TRL is patched when the script brings it in.

Whoever imports TRL early to patch it would take from the script the environment variables that it sets first.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

TRAINER_MODULE = "trl.trainer.grpo_trainer"
CONFIG_MODULE = "trl.trainer.grpo_config"
ENGINE_MODULE = "trl.generation.vllm_generation"

Execute = Callable[[ModuleType], None]
Hook = Callable[[Execute, ModuleType], None]


class _Importing(importlib.abc.MetaPathFinder):
    """Hands the import of some modules to hooks, each of which runs the module's body and does its work around it."""

    def __init__(self, hooks: dict[str, Hook]) -> None:
        self._hooks = dict(hooks)
        self._asking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        hook = self._hooks.get(name)
        if hook is None or name in self._asking:
            return None
        self._asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.discard(name)
        if spec is None or spec.loader is None:
            return None
        spec.loader.exec_module = functools.partial(hook, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def after_import(then: Callable[[ModuleType], None]) -> Hook:
    """A hook that calls `then` with the imported module."""

    def hook(execute: Execute, module: ModuleType) -> None:
        execute(module)
        then(module)

    return hook


def hook_imports(hooks: dict[str, Hook]) -> importlib.abc.MetaPathFinder:
    """Put each hook around its module's import; around nothing where the module is imported already. Answers the finder
    that was put first on `sys.meta_path`, for the caller to take out."""
    waiting = dict(hooks)
    for name in hooks.keys() & sys.modules.keys():
        waiting.pop(name)(lambda module: None, sys.modules[name])
    finder = _Importing(waiting)
    sys.meta_path.insert(0, finder)
    return finder
