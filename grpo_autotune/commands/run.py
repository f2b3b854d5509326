"""`grpo-autotune run`: an unchanged TRL script with a probe on every `GRPOTrainer`, as `cProfile` does for Python."""

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import set_environment
from grpo_autotune.commands.page import keep_page
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.console import Heartbeat, as_warning, is_first_rank, say, warn
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.device import runtime_facts
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.startup import Startup
from grpo_autotune.processes.ending import raising
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.records.report import Report
from grpo_autotune.report.create import report_of
from grpo_autotune.report.files import REPORT_FILE, clear, save_report
from grpo_autotune.scripts.hooks import EnoughSteps, ScriptHooks, require_script, run_as_main
from grpo_autotune.scripts.values import SPEEDUPS, ScriptValues, load_script_values


class _Measurement:
    """The measurement of one trainer, which it does not keep alive: its record is taken when a training ends."""

    def __init__(self, probe: Any, folder: Path) -> None:
        self.probe, self.folder = weakref.ref(probe), folder
        self.record: ProbeRecord | None = None

    @as_warning("what was measured was not saved")
    def take(self, probe: Any) -> None:
        """Take what was measured so far, and save it: the script may end the process without another word."""
        record = probe.record()
        if record.timings.step_s:
            self.record = record
            if is_first_rank():
                save_report(report_of(record, None, ceilings=False), self.folder)

    @as_warning("no report")
    def report(self) -> Report | None:
        """The report with the machine's limits, saved; None where no step was finished, and on ranks but the first."""
        if self.record is None or not is_first_rank():
            return None
        report = report_of(self.record, None)
        with as_warning("the report was not saved"):
            save_report(report, self.folder)
            keep_page(self.folder)
        return report


class ScriptProbes(ScriptHooks):
    """The probes of one script's trainers. What fails in measuring is a warning, and the script goes on."""

    def __init__(
        self,
        out_dir: Path,  # of the first trainer's report; those of further ones lie in it
        steps: int | None,  # the script ends after so many measured steps of one trainer; None lets it run
        values: ScriptValues,  # given to every trainer in place of what the script says
        receipt: Receipt | None = None,  # measurements of these values; a live speed that differs is reported
    ) -> None:
        super().__init__(values, Startup(), say)
        self.out_dir, self.steps, self.receipt = out_dir, steps, receipt
        self.measured: list[_Measurement] = []

    def reports(self) -> list[Report]:
        """A report for each trainer that finished a step, saved in its folder by the first rank."""
        return [report for one in self.measured if (report := one.report()) is not None]

    def closing_line(self) -> str:
        """Paths of the reports, or the reason that there is none."""
        if not self.measured:
            return "No report: the script built no GRPOTrainer that could be measured."
        files = [one.folder / REPORT_FILE for one in self.measured if one.record is not None]
        if not files:
            return "No report: no optimizer step was finished."
        return f"Saved: {', '.join(str(file) for file in files if file.exists()) or 'nothing'}"

    def now(self) -> str | None:
        """The stage of the newest trainer, or else the phase of the script's start; for a heartbeat."""
        for one in reversed(self.measured):
            if (probe := one.probe()) is not None and probe.recorder.is_open:
                stage: str | None = probe.now()
                return stage
        return self.startup.now()

    def before_build(self) -> None:
        if self.measured:
            self.startup = Startup(born_s=time.time())

    @as_warning("a trainer is not measured")
    def after_build(self, trainer: Any) -> None:
        from grpo_autotune.probe.probe import Probe
        from grpo_autotune.probe.trainer_facts import trained_rows
        from grpo_autotune.train.runs.callbacks import StopAfter
        from grpo_autotune.train.runs.receipt_check import SpeedWatch, differences, set_up_otherwise

        if self.receipt is not None:
            runtime = runtime_facts(trainer.args.device)
            sentences = (*differences(self.receipt, detect()), *set_up_otherwise(self.receipt, runtime))
            for sentence in sentences if not self.measured else ():
                warn(sentence)
            trainer.add_callback(SpeedWatch(self.receipt, warn, partial(trained_rows, trainer)))
        stop = StopAfter(self.steps) if self.steps is not None else None
        if stop is not None:  # also a trainer that cannot be measured ends there
            trainer.add_callback(stop)
        number = len(self.measured) + 1
        folder = self.out_dir if number == 1 else self.out_dir / f"trainer-{number}"
        live = LiveFile(folder)
        probe = Probe(trainer, startup=self.startup, out_dir=folder, say=warn, live=live)
        self.measured.append(_Measurement(probe, folder))
        if stop is not None:
            stop.steps += probe.warmup
            live.total = stop.steps

    def train(self, trainer: Any, train: Callable[[], Any]) -> Any:
        ours = [(one, probe) for one in self.measured if (probe := one.probe()) and probe.trainer is trainer]
        try:
            result = train()
        finally:
            for one, probe in ours:
                one.take(probe)
        from grpo_autotune.train.runs.callbacks import StopAfter

        stops = [one for one in trainer.callback_handler.callbacks if isinstance(one, StopAfter)]
        if any(stop.is_reached for stop in stops):
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
    """Run `script` as `python script arguments...` would; however it ends, `finish` gets its probes first, and what
    ended it is raised: its own error, `SystemExit`, `KeyboardInterrupt`. See `ScriptProbes`; `output` is held while the
    script runs, to lead its standard output elsewhere."""
    require_script(script)
    set_environment()
    out_dir = out_dir.absolute()  # wherever the script works later
    with as_warning(f"{out_dir} keeps what an earlier run measured"):
        if is_first_rank():
            clear(out_dir)
    probes = ScriptProbes(out_dir, steps, values, receipt)
    try:
        with raising(lambda signum: SystemExit(128 + signum)), Heartbeat(probes.now, say), output:
            run_as_main(script, arguments, probes)
    finally:
        finish(probes)


def values_for_script(path: Path | None, speedups: str | None) -> tuple[ScriptValues, Receipt | None]:
    """The values of `--with` and `--speedups`, and the receipt unless `--speedups` makes it one of something else."""
    values, receipt = load_script_values(path) if path is not None else ({}, None)
    if speedups is not None:
        values[SPEEDUPS], receipt = _speedups_of(speedups), None
    return ScriptValues(values), receipt


def _speedups_of(text: str) -> Any:
    """The value of `--speedups`: `auto`, `none`, names with commas, or a list in YAML, whose items may have options."""
    if text.startswith("["):
        return parse_yaml(text, "--speedups")
    return text if text in ("auto", "none") else text.split(",")
