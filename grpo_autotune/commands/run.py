"""Run somebody's unchanged TRL script with a probe on every `GRPOTrainer` it builds, as `cProfile` does for Python.

TRL is not imported before the script does it, so that environment variables which the script sets first keep working.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from grpo_autotune.console import Heartbeat, is_first_rank, say, warn
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import detect
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.records.report import Report
from grpo_autotune.report.create import report_of
from grpo_autotune.scripts.values import SPEEDUPS, ScriptValues, load_script_values
from grpo_autotune.seams.import_hooks import (
    CONFIG_MODULE,
    ENGINE_MODULE,
    TRAINER_MODULE,
    Execute,
    Hook,
    after_import,
    hook_imports,
)
from grpo_autotune.seams.torchvision_compat import import_mended

SIGTERM_EXIT = 128 + signal.SIGTERM


class EnoughSteps(SystemExit):
    """Ends the script once the steps asked for were measured; exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class ScriptProbes:
    """The probes of one script's trainers."""

    def __init__(
        self, startup: Startup, out_dir: Path, steps: int | None, values: ScriptValues, receipt: Receipt | None = None
    ) -> None:
        self.startup, self.out_dir, self.steps, self.values, self.receipt = startup, out_dir, steps, values, receipt
        self.probes: list[Any] = []
        self.folders: list[Path] = []

    def hooks(self) -> dict[str, Hook]:
        """What to do around the script's import of which module."""
        return {
            "torchvision": _mending,
            CONFIG_MODULE: after_import(self.values.on_config_module),
            TRAINER_MODULE: after_import(self._on_trainer_module),
            ENGINE_MODULE: after_import(self._on_engine_module),
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
                found: str | None = probe.now()
                return found
        return self.startup.now()

    def _on_trainer_module(self, module: ModuleType) -> None:
        from grpo_autotune.seams.layers import AttributeSlot, wrap

        self.values.on_trainer_module(module)
        wrap(AttributeSlot(module.GRPOTrainer, "__init__"), self._built)
        wrap(AttributeSlot(module.GRPOTrainer, "train"), self._trained)
        wrap(AttributeSlot(module, "create_model_from_path"), self._phase("model"))

    def _on_engine_module(self, module: ModuleType) -> None:
        from grpo_autotune.seams.layers import AttributeSlot, wrap

        self.values.on_engine_module(module)
        wrap(AttributeSlot(module.VLLMGeneration, "__init__"), self._phase("engine"))

    def _phase(self, name: str) -> Any:
        def timed(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            with self.startup.phase(name):
                return call_next(*args, **kwargs)

        return timed

    def _built(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        if self.probes:
            self.startup = Startup(born_s=time.time())
        self.startup.since_birth("script")
        kwargs = self.values.arguments(kwargs)
        with self.startup.phase("trainer"):
            call_next(trainer, *args, **kwargs)
        from grpo_autotune.probe.probe import Probe
        from grpo_autotune.train.runs.receipt_check import SpeedWatch, differences
        from grpo_autotune.train.runs.stop_after import StopAfter

        self.values.finish(trainer, say)
        if self.receipt is not None:
            for sentence in differences(self.receipt, detect()) if not self.probes else ():
                warn(sentence)
            trainer.add_callback(SpeedWatch(self.receipt, warn))
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
    script: Path,
    arguments: Sequence[str],
    *,
    steps: int | None,
    out_dir: Path,
    finish: Callable[[ScriptProbes], None],
    output: AbstractContextManager[None],
    values: ScriptValues,
    receipt: Receipt | None = None,
) -> None:
    """Run `script` as `python script arguments...` would; however it ends, `finish` gets its probes first.

    Args:
        script: A Python file.
        arguments: The rest of the script's `sys.argv`.
        steps: End the script after so many measured steps of one trainer; None lets it run.
        out_dir: Folder of the first trainer's report; those of further ones lie in it.
        finish: Given the probes once the script has ended.
        output: Held while the script runs, to lead its standard output elsewhere.
        values: What every trainer is given in place of what the script says.
        receipt: What was measured with these values; told where live speed is another.

    Raises:
        ConfigError: There is no such script, or its trainer cannot be given the values.
        BaseException: Whatever ended the script: its own error, `SystemExit`, `KeyboardInterrupt`.
    """
    if not script.is_file():
        raise ConfigError(
            "no such script", where=str(script), fix="Give the path of a Python file that builds a GRPOTrainer."
        )
    probes = ScriptProbes(Startup(), out_dir, steps, values, receipt)
    finder = hook_imports(probes.hooks())
    before = sys.argv, sys.path[0]
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with Heartbeat(probes.now, say), output:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.argv, sys.path[0] = before
        sys.meta_path.remove(finder)
        finish(probes)


def values_for_script(path: Path | None, speedups: str | None) -> tuple[ScriptValues, Receipt | None]:
    """What `--with` and `--speedups` ask for; where the latter does, the receipt tells of something else.

    Raises:
        ConfigError: The file cannot be read or holds something else, or there is no such speed-up.
    """
    values, receipt = load_script_values(path) if path is not None else ({}, None)
    if speedups is not None:
        values[SPEEDUPS] = speedups if speedups in ("auto", "none") else speedups.split(",")
        receipt = None
    return ScriptValues(values), receipt


def _mending(execute: Execute, module: ModuleType) -> None:
    finding = import_mended(execute, module)
    if finding is not None:
        say(f"note: {finding}")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(SIGTERM_EXIT)
