"""A trial of somebody's own TRL script: its `GRPOConfig` takes the trial's values, and its first `train()` is measured.

The script ends where its first training would.
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_autotune.errors import AutotuneError, ConfigError, RewardError
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trial import TrialSpec
from grpo_autotune.scripts.values import ScriptValues
from grpo_autotune.seams.import_hooks import CONFIG_MODULE, ENGINE_MODULE, TRAINER_MODULE, after_import, hook_imports
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.seams.torchvision_compat import import_mended
from grpo_autotune.train.trial_trainer import TRIAL
from grpo_autotune.trials.heartbeat import Pulse

if TYPE_CHECKING:
    from grpo_autotune.trials.child.measure import Measured


class _Finished(SystemExit):
    """Ends the script once its training was measured."""


def run_script(
    spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse, trl_imported: Callable[[], None]
) -> Measured:
    """Run `spec.script` as `python script arguments...` would, up to the end of its first training.

    Args:
        spec: The trial.
        folder: Its folder.
        startup: Gets the phases `script`, `model`, `engine` and `trainer`.
        pulse: The heartbeat.
        trl_imported: Called once TRL's trainer was imported, before any model is there.

    Raises:
        ConfigError: There is no such script, it trains nothing, or TRL has no such key or refuses its value.
        RewardError: A reward function raised.
        Exception: Whatever the script raises.
    """
    path, *arguments = spec.script or [""]
    if not Path(path).is_file():
        raise ConfigError("no such script", where=path, fix="Give the path of a Python file that builds a GRPOTrainer.")
    trial = _ScriptTrial(spec, folder, startup, pulse, trl_imported)
    hook_imports(
        {
            "torchvision": _mend,
            CONFIG_MODULE: after_import(trial.values.on_config_module),
            TRAINER_MODULE: after_import(trial.on_trainer_module),
            ENGINE_MODULE: after_import(trial.on_engine_module),
        }
    )
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if trial.measured is None and end.code not in (None, 0):
            raise ConfigError(f"the script ended with {end.code!r} before it trained", where=path) from end
    if trial.measured is None:
        raise ConfigError("the script trained no GRPOTrainer", where=path, fix="Call train() of a GRPOTrainer in it.")
    return trial.measured


class _ScriptTrial:
    """The patches on TRL, and what came of the first training."""

    def __init__(
        self, spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse, trl_imported: Callable[[], None]
    ) -> None:
        self._spec, self._folder, self._startup, self._pulse = spec, folder, startup, pulse
        self._trl_imported = trl_imported
        self.values = ScriptValues(spec.knobs, TRIAL)
        self.measured: Measured | None = None

    def on_trainer_module(self, module: ModuleType) -> None:
        self._trl_imported()
        self.values.on_trainer_module(module)
        wrap(AttributeSlot(module.GRPOTrainer, "__init__"), self._built)
        wrap(AttributeSlot(module.GRPOTrainer, "train"), self._trained)
        wrap(AttributeSlot(module, "create_model_from_path"), self._phase("model"))

    def on_engine_module(self, module: ModuleType) -> None:
        self.values.on_engine_module(module)
        wrap(AttributeSlot(module.VLLMGeneration, "__init__"), self._phase("engine"))

    def _phase(self, name: str) -> Any:
        def timed(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            with self._startup.phase(name):
                return call_next(*args, **kwargs)

        return timed

    def _built(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        kwargs = self.values.arguments(kwargs)
        self._startup.since_birth("script")
        with self._startup.phase("trainer"):
            call_next(trainer, *args, **kwargs)
        self.values.finish(trainer, _say)

    def _trained(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        from grpo_autotune.seams.table import reward_slots
        from grpo_autotune.trials.child.measure import measure

        for name, is_async, slot in reward_slots(trainer):
            wrap(slot, _blaming_async(name) if is_async else _blaming(name))
        train = functools.partial(call_next, trainer, *args, **kwargs)
        self.measured = measure(trainer, self._spec, self._folder, self._startup, self._pulse, train)
        raise _Finished


def _blaming(name: str) -> Any:
    def reward(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return call_next(*args, **kwargs)
        except Exception as error:
            raise _blame(name, error) from error

    return reward


def _blaming_async(name: str) -> Any:
    async def reward(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await call_next(*args, **kwargs)
        except Exception as error:
            raise _blame(name, error) from error

    return reward


def _blame(name: str, error: Exception) -> AutotuneError:
    if isinstance(error, AutotuneError):
        return error
    return RewardError(f"raised {type(error).__name__}: {error}", where=f"reward {name}")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _mend(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    finding = import_mended(execute, module)
    if finding is not None:
        _say(f"note: {finding}")
