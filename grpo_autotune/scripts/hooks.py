"""A user's TRL script run as `__main__`, with layers on the trainers that it builds.

TRL is not imported before the script does it, so that environment variables which the script sets first keep working.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.files import is_file
from grpo_autotune.probe.startup import Startup, timed
from grpo_autotune.scripts.values import ScriptValues
from grpo_autotune.seams.import_hooks import (
    CONFIG_MODULE,
    ENGINE_MODULE,
    TRAINER_MODULE,
    Execute,
    Hook,
    after_import,
    hook_imports,
)
from grpo_autotune.seams.layers import AttributeSlot, Next, wrap
from grpo_autotune.seams.torchvision_compat import import_mended, tell_once


class EnoughSteps(SystemExit):
    """Ends the script once its training was measured; exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class ScriptHooks:
    """Layers on every `GRPOTrainer` of a script: its values are put in, and its start-up is counted by phase: `script`,
    `model`, `engine` and `trainer`. A subclass overrides `before_build`, `after_build` and `train`, and may exchange
    `startup` per trainer."""

    def __init__(self, values: ScriptValues, startup: Startup, say: Callable[[str], None]) -> None:
        self.values, self.startup, self.say = values, startup, say

    def hooks(self) -> dict[str, Hook]:
        """Hooks around the script's imports, by module."""
        return {
            "torchvision": self._mend_torchvision,
            CONFIG_MODULE: after_import(self.values.on_config_module),
            TRAINER_MODULE: after_import(self.on_trainer_module),
            ENGINE_MODULE: after_import(self._on_engine_module),
        }

    def on_trainer_module(self, module: ModuleType) -> None:
        """Put the layers on TRL's trainer once it was imported, before any model is there."""
        self.values.unlocked.enter_trainers(module)
        wrap(AttributeSlot(module.GRPOTrainer, "__init__"), self._build)
        wrap(AttributeSlot(module.GRPOTrainer, "train"), self._train)
        wrap(AttributeSlot(module, "create_model_from_path"), timed(self._phase, "model"))

    def before_build(self) -> None:
        """Prepare for a trainer that the script is about to build."""

    def after_build(self, trainer: Any) -> None:
        """Receive a trainer that was built and has its values and speed-ups."""

    def train(self, trainer: Any, train: Callable[[], Any]) -> Any:
        """Call `train`, the trainer's own with the script's arguments, for its result; EnoughSteps ends the script."""
        return train()

    def _on_engine_module(self, module: ModuleType) -> None:
        self.values.unlocked.enter(module)  # engines are mended whatever the values are
        wrap(AttributeSlot(module.VLLMGeneration, "__init__"), timed(self._phase, "engine"))

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.startup.phase(name)

    def _build(self, call_next: Next, trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        self.before_build()
        self.startup.since_birth("script")
        kwargs = self.values.arguments(kwargs)
        with self.startup.phase("trainer"):
            call_next(trainer, *args, **kwargs)
        self.values.finish(trainer, self.say)
        self.after_build(trainer)

    def _train(self, call_next: Next, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.train(trainer, partial(call_next, trainer, *args, **kwargs))

    def _mend_torchvision(self, execute: Execute, module: ModuleType) -> None:
        finding = import_mended(execute, module)
        if finding is not None:
            tell_once(finding, self.say)


def require_script(script: Path) -> None:
    """ConfigError for a path at which there is no file, or a notebook."""
    if script.suffix == ".ipynb":
        fix = f"Give what `jupyter nbconvert --to script {script}` writes, or use attach(trainer) in a cell."
        raise ConfigError("this is a notebook, and no script", where=str(script), fix=fix)
    if not is_file(script):
        fix = "Give the path of a Python file that builds a GRPOTrainer."
        raise ConfigError("no such script", where=str(script), fix=fix)


def run_as_main(script: Path, arguments: Sequence[str], hooks: ScriptHooks) -> None:
    """Run `script` as `python script arguments...` would, until it ends or `hooks`, which are put around its imports,
    have measured enough; `sys.argv` and `sys.path` are as before then. ConfigError where there is no such script, or
    its trainer cannot be given the values; else raises whatever ends it: its own error, `SystemExit`,
    `KeyboardInterrupt`."""
    require_script(script)
    before = sys.argv, sys.path[0]
    finder = hook_imports(hooks.hooks())
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except EnoughSteps:
        pass
    finally:
        sys.argv, sys.path[0] = before
        sys.meta_path.remove(finder)
