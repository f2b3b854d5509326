"""The probe in your own script: `probe = attach(trainer)`, `trainer.train()`, `print(probe.report())`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_autotune.console import is_first_rank
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.report import Report
from grpo_autotune.render.terminal import render
from grpo_autotune.report.create import report_of
from grpo_autotune.report.files import save_report


class PrintableReport:
    """A report that prints itself, and is a page in a notebook; `data` is the report, `to_dict()` what its file holds."""

    def __init__(self, data: Report | SearchReport, contents: Callable[[], tuple[str, list[Section]]]) -> None:
        self.data, self._contents = data, contents

    def __str__(self) -> str:
        return render_search(self.data) if isinstance(self.data, SearchReport) else render(self.data)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_cell(*self._contents())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return self.data.model_dump(mode="json")

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and the page `report.html` into `folder`, which is created where it is missing."""
        from grpo_autotune.commands.page import keep_page

        save_report(self.data, folder)
        keep_page(Path(folder))


class AttachedProbe:
    """The probe of one trainer, as `attach` returns it."""

    def __init__(self, probe: Probe, out_dir: Path | None) -> None:
        self._probe, self._out_dir = probe, out_dir

    def record(self) -> ProbeRecord:
        """The raw measurements so far."""
        return self._probe.record()

    def report(self) -> PrintableReport:
        """The report so far, saved as `report.json` too where `attach` was given a folder.

        Raises:
            ConfigError: No optimizer step was finished yet.
        """
        record = self._probe.record()
        if not record.timings.step_s:
            raise ConfigError(
                "nothing was measured: no optimizer step has ended since attach(trainer)",
                fix="Call report() after trainer.train().",
            )
        report = report_of(record, None)
        if self._out_dir is not None and is_first_rank():
            save_report(report, self._out_dir)
        return PrintableReport(report)

    def detach(self) -> None:
        """Leave the trainer as it was; the report stays available."""
        self._probe.detach()


def attach(trainer: Any, *, out_dir: str | Path | None = None) -> AttachedProbe:
    """Measure every optimizer step of `trainer`, a `trl.GRPOTrainer`, from now on.

    Args:
        trainer: The trainer, before or during `train()`.
        out_dir: Folder for `report.json` and `spans.jsonl`; nothing is written without it.

    Returns:
        A probe with `report()`, `record()` and `detach()`.

    Raises:
        ConfigError: `trainer` is not a `GRPOTrainer`.
        SeamError: The installed TRL lacks a method that holds a stage.
    """
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise ConfigError(f"attach() takes a trl.GRPOTrainer, got {type(trainer).__name__}")
    folder = None if out_dir is None else Path(out_dir).absolute()  # wherever the script works later
    return AttachedProbe(Probe(trainer, out_dir=folder, live=LiveFile(folder) if folder else None), folder)
