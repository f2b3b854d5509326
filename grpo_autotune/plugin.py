"""The probe in your own script: `probe = attach(trainer)`, `trainer.train()`, `print(probe.report())`."""

import os
from pathlib import Path
from typing import Any

from grpo_autotune.commands.page import PrintableReport
from grpo_autotune.console import is_first_rank
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.report.create import report_of
from grpo_autotune.report.files import save_report


class AttachedProbe:
    """The probe of one trainer, as `attach` returns it."""

    def __init__(self, probe: Probe, out_dir: Path | None) -> None:
        self._probe, self._out_dir = probe, out_dir

    def record(self) -> ProbeRecord:
        """The raw measurements so far."""
        return self._probe.record()

    def report(self) -> PrintableReport:
        """The report so far, saved as `report.json` too where `attach` was given a folder; ConfigError before the first
        optimizer step was finished."""
        record = self._probe.record()
        if not record.timings.step_s:
            fix = "Call report() after trainer.train()."
            raise ConfigError("nothing was measured: no optimizer step has ended since attach(trainer)", fix=fix)
        report = report_of(record, None)
        if self._out_dir is not None and is_first_rank():
            save_report(report, self._out_dir)
        return PrintableReport(report, self._out_dir or Path(os.devnull))

    def detach(self) -> None:
        """Leave the trainer as it was; the report stays available."""
        self._probe.detach()


def attach(trainer: Any, *, out_dir: str | Path | None = None) -> AttachedProbe:
    """Measure every optimizer step of `trainer`, a `trl.GRPOTrainer`, from now on, in place of a probe attached before.

    Args:
        trainer: The trainer, before or during `train()`.
        out_dir: Folder for `report.json` and `spans.jsonl`; nothing is written without it.

    Returns:
        A probe with `report()`, `record()` and `detach()`.

    Raises:
        ConfigError: `trainer` is not a `GRPOTrainer`.
        SeamError: The installed TRL lacks the method that ends a step."""
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise ConfigError(f"attach() takes a trl.GRPOTrainer, got {type(trainer).__name__}")
    folder = None if out_dir is None else Path(out_dir).absolute()  # wherever the script works later
    probe = Probe(trainer, out_dir=folder, live=LiveFile(folder) if folder else None)
    before, trainer._grpo_autotune_attached = getattr(trainer, "_grpo_autotune_attached", None), probe
    if before is not None:
        before.detach()
    return AttachedProbe(probe, folder)
