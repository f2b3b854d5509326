"""Run somebody's unchanged TRL script with a probe on every `GRPOTrainer` it builds, as `cProfile` does for Python.

TRL is not imported before the script does it, so that environment variables which the script sets first keep working.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from grpo_autotune.commands.console import is_first_rank, say
from grpo_autotune.commands.reporting import report_of
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.startup import Heartbeat, Startup
from grpo_autotune.report import Report

TRAINER_MODULE = "trl.trainer.grpo_trainer"
ENGINE_MODULE = "trl.generation.vllm_generation"
SIGTERM_EXIT = 128 + signal.SIGTERM


class EnoughSteps(SystemExit):
    """Ends the script once the steps asked for were measured; exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it has been imported."""

    def __init__(self, hooks: dict[str, Callable[[ModuleType], None]]) -> None:
        self._hooks = dict(hooks)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        hook = self._hooks.pop(name, None)
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_then_hook(module: ModuleType) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_then_hook  # type: ignore[method-assign]
        return spec


def after_import(hooks: dict[str, Callable[[ModuleType], None]]) -> importlib.abc.MetaPathFinder:
    """Call each hook with its module: now if it is imported already, else when it is."""
    waiting = {}
    for name, hook in hooks.items():
        if name in sys.modules:
            hook(sys.modules[name])
        else:
            waiting[name] = hook
    finder = _AfterImport(waiting)
    sys.meta_path.insert(0, finder)
    return finder


class ScriptProbes:
    """The probes of one script's trainers."""

    def __init__(self, startup: Startup, out_dir: Path, steps: int | None) -> None:
        self.startup, self.out_dir, self.steps = startup, out_dir, steps
        self.probes: list[Any] = []
        self.folders: list[Path] = []

    def hooks(self) -> dict[str, Callable[[ModuleType], None]]:
        """What to do once the script has imported which module."""
        return {
            "torch": lambda module: _mend_torchvision(),
            TRAINER_MODULE: self._on_trainer_module,
            ENGINE_MODULE: self._on_engine_module,
        }

    def reports(self) -> list[Report]:
        """A report for each trainer that finished a step, saved in its folder by the first rank."""
        found = []
        for probe, folder in zip(self.probes, self.folders, strict=True):
            probe.detach()
            record = probe.record()
            if record.timings.step_s and is_first_rank():
                found.append(report_of(record, None, folder))
        return found

    def closing_line(self) -> str:
        """Where the reports are, or why there is none."""
        if not self.probes:
            return "No report: the script built no GRPOTrainer."
        measured = [folder for probe, folder in zip(self.probes, self.folders, strict=True) if probe.closed]
        if not measured:
            return "No report: no optimizer step was finished."
        return f"Saved: {', '.join(str(folder / 'report.json') for folder in measured)}"

    def now(self) -> str | None:
        """What the newest trainer, or else the script, is doing."""
        for probe in reversed(self.probes):
            if probe.recorder.is_open:
                return str(probe.now())
        return self.startup.now()

    def _on_trainer_module(self, module: ModuleType) -> None:
        from grpo_autotune.seams.layers import AttributeSlot, wrap

        wrap(AttributeSlot(module.GRPOTrainer, "__init__"), self._built)
        wrap(AttributeSlot(module.GRPOTrainer, "train"), self._trained)
        wrap(AttributeSlot(module, "create_model_from_path"), self._phase("model"))

    def _on_engine_module(self, module: ModuleType) -> None:
        from grpo_autotune.seams.layers import AttributeSlot, wrap

        wrap(AttributeSlot(module.VLLMGeneration, "__init__"), self._phase("engine"))

    def _phase(self, name: str) -> Any:
        def timed(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            with self.startup.phase(name):
                return call_next(*args, **kwargs)

        return timed

    def _built(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        self.startup.since_birth("script")
        with self.startup.phase("trainer"):
            call_next(trainer, *args, **kwargs)
        from grpo_autotune.commands.stopping import StopAfter
        from grpo_autotune.probe.attach import Probe

        number = len(self.probes) + 1
        folder = self.out_dir if number == 1 else self.out_dir / f"trainer-{number}"
        probe = Probe(trainer, startup=self.startup, out_dir=folder)
        self.probes.append(probe)
        self.folders.append(folder)
        if self.steps is not None:
            trainer.add_callback(StopAfter(self.steps + probe.warmup))

    def _trained(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = call_next(trainer, *args, **kwargs)
        probe = next((probe for probe in self.probes if probe.trainer is trainer), None)
        if probe is not None and self.steps is not None and probe.closed >= self.steps + probe.warmup:
            raise EnoughSteps
        return result


def run_script(
    script: Path, arguments: Sequence[str], *, steps: int | None, out_dir: Path, finish: Callable[[ScriptProbes], None]
) -> None:
    """Run `script` as `python script arguments...` would; however it ends, `finish` gets its probes first.

    Raises:
        ConfigError: There is no such script.
        BaseException: Whatever ended the script: its own error, `SystemExit`, `KeyboardInterrupt`.
    """
    if not script.is_file():
        raise ConfigError(
            "no such script", where=str(script), fix="Give the path of a Python file that builds a GRPOTrainer."
        )
    probes = ScriptProbes(Startup(), out_dir, steps)
    finder = after_import(probes.hooks())
    before = sys.argv, sys.path[0]
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with Heartbeat(probes.now, say):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.argv, sys.path[0] = before
        sys.meta_path.remove(finder)
        finish(probes)


def _mend_torchvision() -> None:
    from grpo_autotune.seams.compat import ensure_torchvision

    finding = ensure_torchvision()
    if finding is not None:
        say(finding)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(SIGTERM_EXIT)
