"""`grpo-autotune plan`: how long a run will take, from a stored probe, or from one that is made for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median

from grpo_autotune.advice.facts import Facts
from grpo_autotune.commands.probe import probe_config
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.predict.room import memory_of
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.plan import Plan
from grpo_autotune.records.probe import ProbeRecord, StageRow, StageTimings
from grpo_autotune.records.report import Report
from grpo_autotune.report.files import REPORT_FILE, load_report, save_report
from grpo_autotune.report.plan import Basis, plan_of

PROBE_STEPS = 5


def plan_run(
    source: RunConfig | Path, samples: int | None, output: AbstractContextManager[None], *, with_eval: bool
) -> Plan:
    """Plan a configuration or a stored run that begins now. Raises as `basis_of_config`, `basis_of_run`, `plan_of`."""
    basis = basis_of_run(source) if isinstance(source, Path) else basis_of_config(source, output, with_eval=with_eval)
    return plan_of(replace(basis, samples=samples or 0), datetime.now().astimezone())


def basis_of_config(config: RunConfig, output: AbstractContextManager[None], *, with_eval: bool) -> Basis:
    """The probe in the run folder of a configuration: made where there is none of the same configuration, or none
    `with_eval`. Raises as `probe_config`."""
    folder = config.run_dir / "probe"
    stored = load_report(folder) if (folder / REPORT_FILE).is_file() else None
    if stored is None or stored.config != config.model_dump(mode="json") or (with_eval and not stored.occasions):
        say(f"Probing first, into {folder}; the next plan of this configuration takes that probe.")

        def save(report: Report) -> None:
            save_report(report, folder)

        probe_config(config, steps=PROBE_STEPS, out_dir=folder, output=output, show=save, with_eval=with_eval)
    return basis_of_run(folder)


def basis_of_run(source: Path) -> Basis:
    """The basis that a stored run is: a probe, a training run, or a script's run.

    Raises:
        ConfigError: There is none, or it does not tell enough.
    """
    report = load_report(source)
    record = record_of(report)
    machine = Machine.model_validate(report.machine) if report.machine else detect()
    try:
        facts = Facts(record, break_down(record.timings), machine=machine)
        if report.config is not None:
            facts = replace(facts, config=RunConfig.from_dict(report.config))
        base, models, once = facts.base, facts.models, report.occasions
    except NothingSucceeded as error:
        raise ConfigError("this run measured no whole step", where=str(source), fix="Probe again.") from error
    if base is None or models is None:
        raise ConfigError("this run does not tell enough for a plan", where=str(source), fix="Plan a CONFIG.")
    return Basis(base, record, models, str(source), once, memory_bytes=memory_of(machine, record.trainer))


def record_of(report: Report) -> ProbeRecord:
    """The record that a report tells of, without evaluations and checkpoints: a step logs, saves and evaluates for as
    long as most do. Of the parts of stages a report tells their sum over the steps."""
    steps, seen = report.step_seconds, next((r.per_step_s for r in report.stages if r.name == "log_save_eval"), [])
    rest = [min(s, median(seen)) for s in seen]
    step_s = [s - a + b for s, a, b in zip(steps, seen, rest, strict=True)] if seen else steps
    scale = sum(steps) / (sum(step_s) or 1.0)  # shares are of the steps as they were
    stages = [
        StageRow(
            name=row.name,
            per_step_s=(rest if row.name == "log_save_eval" else row.per_step_s) or [row.share * s for s in step_s],
            parts={part.name: [part.share * scale * s for s in step_s] for part in row.parts},
            peak_bytes=row.peak_bytes,
        )
        for row in report.stages
    ]
    timings = StageTimings(steps=report.steps, step_s=step_s, stages=stages, cycle=report.cycle)
    same = {name: getattr(report, name) for name in ProbeRecord.model_fields.keys() & Report.model_fields.keys()}
    return ProbeRecord(**{**same, "ranks": [], "timings": timings})
