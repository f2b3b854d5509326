"""From a probe to a report on disk: measure the machine's ceilings, build, save; what is printed is what was saved."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import is_first_rank
from grpo_autotune.hardware import detect, measure_ceilings
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.report import Report
from grpo_autotune.report.files import save_report


def report_of(record: ProbeRecord, config: RunConfig | None, folder: Path | None) -> Report:
    """Build the report of one probe record, and save it in `folder` when one is given.

    Only the first rank measures the machine and writes: ranks that did so side by side would share its cores and files.
    """
    from grpo_autotune.report.build import build_report  # with numpy, before which a script may set its threads

    first = is_first_rank()
    ceilings = measure_ceilings(record.trainer.device, record.trainer.dtype) if first else None
    report = build_report(record, machine=detect(), ceilings=ceilings, config=config)
    if first and folder is not None:
        save_report(report, folder)
    return report
