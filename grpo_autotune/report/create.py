"""From a probe's record to a report: measure the machine's ceilings, and build."""

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import is_first_rank
from grpo_autotune.hardware import detect, measure_ceilings
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.report import Report


def report_of(record: ProbeRecord, config: RunConfig | None, *, ceilings: bool = True) -> Report:
    """Build the report of one probe record. Only the first rank measures the machine: ranks that did so side by side
    would share its cores. That takes seconds, and is left out without `ceilings`."""
    from grpo_autotune.report.build import build_report  # with numpy, before which a script may set its threads

    limits = measure_ceilings(record.trainer.device, record.trainer.dtype) if ceilings and is_first_rank() else None
    return build_report(record, machine=detect(), ceilings=limits, config=config)
