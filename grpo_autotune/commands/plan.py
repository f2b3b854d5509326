"""`grpo-autotune plan`: how long a run will take, from a stored probe or search, or a probe that is made for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median

from grpo_autotune.advice.facts import Facts
from grpo_autotune.commands.page import keep_page
from grpo_autotune.commands.probe import probe_config
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.knobs import with_knobs
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import evaluation_every, groups_per_step, save_every
from grpo_autotune.predict.room import memory_of
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.plan import Plan
from grpo_autotune.records.probe import ProbeRecord, StageRow, StageTimings
from grpo_autotune.records.report import Report
from grpo_autotune.render.plan import plan_page
from grpo_autotune.report.configuration import settings
from grpo_autotune.report.files import REPORT_FILE, load_report, save_report
from grpo_autotune.report.plan import CADENCES, Basis, plan_of
from grpo_autotune.search.evaluator import without_evaluations
from grpo_autotune.search.folder import SEARCH_FILE, SearchFolder, load_search
from grpo_autotune.units import duration

PROBE_STEPS = 5


MOST_EVALUATION = 0.1
"""Share of a run that `full.yaml` leaves to evaluation, as far as 5 times fewer of them do."""
TITLES = {
    "quick": "as many samples as an hour holds, evaluated and saved at its end: to see the reward move",
    "full": "the whole run, evaluated no more often than a tenth of its time allows",
    "final": "the whole run with your own settings, but for exact changes",
}


def plan_run(
    source: RunConfig | Path,
    samples: int | None,
    memory_gb: float | None,
    output: AbstractContextManager[None],
    *,
    with_eval: bool,
    html: Path | None,
    phases: Path | None,
) -> Plan:
    """Plan a configuration or a stored run that begins now; write its page and its phases where that is asked for.

    Raises:
        AutotuneError: As `basis_of_config`, `basis_of_run`, and `plan_of`.
    """
    basis = basis_of_run(source) if isinstance(source, Path) else basis_of_config(source, output, with_eval=with_eval)
    basis = replace(basis, samples=samples or basis.own_samples())
    plan = plan_of(basis, datetime.now().astimezone(), memory_gb)
    try:
        with full_disk_told(phases or Path(), "Make room there."):
            if html is not None:
                write_whole(html, plan_page(plan))
            if phases is not None:
                write_phases(phases, basis, source if isinstance(source, Path) else None)
    except OSError as error:
        where, fix = str(html or phases), "Name another place; without it the plan is printed alone."
        raise ConfigError(f"page or phases cannot be written ({error.strerror})", where=where, fix=fix) from error
    return plan


def write_phases(folder: Path, basis: Basis, run: Path | None) -> None:
    """Write three complete configurations, each with its predicted hours, what differs from the measured one, and the
    proofs of a search's changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, title in TITLES.items():
        tuned = (run or Path()) / ("tuned.exact.yaml" if name == "final" else "tuned.yaml")
        config = load_config(tuned) if run is not None and tuned.is_file() else basis.config
        steps, every = basis.steps(config), evaluation_every(config)
        grpo: dict[str, int] = {}
        if name == "quick":
            steps = max(1, min(steps, int(3600.0 / basis.step(config).value)))
            grpo = {"eval_steps": steps, "save_steps": steps}
        elif name == "full" and every:
            rows = [row for n in CADENCES[:3] for row in basis.run(config, n * every)[1] if row.name == "evaluate"]
            few = [row.every for row in rows if row.share <= MOST_EVALUATION]
            grpo = {"eval_steps": min(steps, min(few, default=rows[-1].every))} if rows else {}
        values = {**config.to_dict(), "grpo": {**config.grpo, **grpo, "max_steps": steps}}
        values["output"] = {**values.get("output", {}), "name": f"{config.output.name or 'run'}-{name}"}
        phase = RunConfig.from_dict(values)
        whole = replace(basis, samples=max(1, round(steps * groups_per_step(phase)))).run(phase)[0]
        before, after = ({key: value for key, value, _ in settings(c.to_dict())} for c in (basis.config, phase))
        keys = [key for key in after if not key.startswith("receipt") and after[key] != before.get(key)]
        lines = [f"Written by grpo-autotune plan: {title}.", f"Predicted to take {duration(whole.value)}"]
        lines[1] += f" ({duration(whole.low)} to {duration(whole.high)})."
        lines += [f"{key}: {before.get(key)} -> {after[key]}" for key in keys]
        lines += [f"{row.key}: {row.proof}" for row in (phase.receipt.changed if phase.receipt else [])]
        write_whole(folder / f"{name}.yaml", "".join(f"# {line}\n" for line in lines) + phase.to_yaml())
    say(f"Saved: {', '.join(str(folder / f'{name}.yaml') for name in TITLES)}")


def basis_of_config(config: RunConfig, output: AbstractContextManager[None], *, with_eval: bool) -> Basis:
    """The probe in the run folder of a configuration: made where there is none of it on this machine, or none
    `with_eval`. Raises as `probe_config`."""
    folder = config.run_dir / "probe"
    stored = load_report(folder) if (folder / REPORT_FILE).is_file() else None
    wanted = config.model_dump(mode="json"), detect().fingerprint
    same = stored is not None and (stored.config, (stored.machine or {}).get("fingerprint")) == wanted
    if stored is None or not same or (with_eval and not stored.occasions):
        say(f"Probing first, into {folder}; the next plan of this configuration takes that probe.")

        def save(report: Report) -> None:
            save_report(report, folder)
            keep_page(folder)

        probe_config(config, steps=PROBE_STEPS, out_dir=folder, output=output, show=save, with_eval=with_eval)
    return basis_of_run(folder)


def basis_of_run(source: Path) -> Basis:
    """The basis that a stored run is: a probe, a training run, or a script's run.

    Raises:
        ConfigError: There is none, or it does not tell enough.
    """
    folder = source if source.is_dir() else source.parent
    if source.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        return _searched(folder)
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
    if base is None or base.batch.processes != record.trainer.world_size:
        ranks = record.trainer.world_size
        raise ConfigError(f"this run had {ranks} ranks", where=str(source), fix=f"Set WORLD_SIZE={ranks} for the plan.")
    if models is None:
        raise ConfigError("this run tells no lengths of completions", where=str(source), fix="Probe again.")
    return Basis(base, record, models, str(source), once, memory_bytes=memory_of(machine, record.trainer))


def _searched(folder: Path) -> Basis:
    """A search's probe, and models that know its trials."""
    search = load_search(folder)
    config, machine = RunConfig.from_dict(search.config or {}), Machine.model_validate(search.machine)
    trials = [(spec, without_evaluations(o)) for spec, o in SearchFolder(folder).trials() if o and o.record]
    probe = next((outcome for spec, outcome in trials if spec.purpose == "probe"), None)
    if probe is None or probe.record is None:
        raise ConfigError("the trials of this search are gone", where=str(folder), fix="Plan a CONFIG.")
    models = Models.from_probe(config, probe.record, machine, probe)
    for spec, outcome in trials:
        if spec.purpose == "timed" and spec.source != "race":
            models = models.learn(with_knobs(config, spec.knobs), outcome)
    every = {"evaluate": (search.evaluation_s, evaluation_every(config)), "save": (search.saving_s, save_every(config))}
    once = {name: per_step_s * steps for name, (per_step_s, steps) in every.items() if per_step_s and steps}
    return Basis(config, probe.record, models, str(folder), once, memory_bytes=memory_of(machine, probe.record.trainer))


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
