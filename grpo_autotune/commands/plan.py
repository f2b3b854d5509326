"""`grpo-autotune plan`: how long a run will take, from a stored probe or search, or a probe that is made for it."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from grpo_autotune.advice.facts import Facts
from grpo_autotune.commands.page import PrintableReport, load_run
from grpo_autotune.commands.probe import probe_config
from grpo_autotune.config.batch import of_other_processes
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.knobs import Knobs, with_knobs
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import groups_per_step
from grpo_autotune.predict.room import memory_of
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.plan import Plan
from grpo_autotune.records.probe import ProbeRecord, StageRow, StageTimings, seconds_once
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.render.plan import plan_page
from grpo_autotune.report.configuration import changed_keys
from grpo_autotune.report.files import REPORT_FILE, load_report
from grpo_autotune.report.plan import CADENCES, Basis, plan_of
from grpo_autotune.search.comparable import faster, without_evaluations
from grpo_autotune.search.evaluator import at_expected, evened
from grpo_autotune.search.folder import SearchFolder
from grpo_autotune.search.leaderboard import Leaderboard
from grpo_autotune.units import duration, plural

PROBE_STEPS = 5
MOST_EVALUATION = 0.1
"""Share of a run that `full.yaml` leaves to evaluation, as far as 5 times fewer of them do."""
TITLES = {
    "quick": "as many samples as an hour holds, evaluated and saved at its end: to see the reward move",
    "full": "the whole run, evaluated no more often than a tenth of its time allows",
    "final": "the whole run with your own settings, but for exact changes",
}
SAMPLED = "The search timed an evaluation by two batches of each held-out data set at most, scaled to all rows."


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
    """Plan a configuration or a stored run that begins now; write its page and its phases where that is asked for."""
    stored = source if isinstance(source, Path) else _probed(source, output, with_eval=with_eval)
    basis = basis_of_run(stored).with_length(samples)
    machine, held = basis.models.machine, {part for row in basis.models.record.timings.stages for part in row.parts}
    searched = isinstance(load_run(stored).data, SearchReport)
    notes = [SAMPLED] if searched and "evaluate" in basis.once_s and "evaluate" not in held else []
    if machine.fingerprint != detect().fingerprint:
        chips = [gpu.name for gpu in machine.gpus] or [plural(machine.cores, "core")]
        notes.append(f"Measured on another machine ({', '.join(chips)}): the plan holds for that one.")
    plan = plan_of(basis, datetime.now().astimezone(), memory_gb, tuple(notes))
    try:
        with full_disk_told(phases or Path(), "Make room there."):
            if html is not None:
                write_whole(html, plan_page(plan))
            if phases is not None:
                write_phases(phases, basis, stored if stored.is_dir() else stored.parent)
    except OSError as error:
        where, fix = str(html or phases), "Name another place; without it the plan is printed alone."
        raise ConfigError(f"page or phases cannot be written ({error.strerror})", where=where, fix=fix) from error
    return plan


def write_phases(folder: Path, basis: Basis, run: Path) -> None:
    """Write three complete configurations, each with its predicted hours, what differs from the measured one, and the
    proofs of a search's changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, title in TITLES.items():
        tuned = run / ("tuned.exact.yaml" if name == "final" else "tuned.yaml")
        config = load_config(tuned) if tuned.is_file() else basis.models.base
        steps, best, grpo = basis.steps(config), grpo_value("load_best_model_at_end", config), dict[str, object]()
        evaluations = [row for row in basis.run(config)[1] if row.name == "evaluate"]
        if name == "quick":
            step_s = basis.sample(config).value * groups_per_step(config)
            rest_s = replace(basis, samples=groups_per_step(config)).run(config)[0].value - step_s
            steps = max(1, min(steps, int((3600.0 - rest_s) / step_s)))
            grpo = {key: steps for key in ("eval", "save") if grpo_value(f"{key}_strategy", config) != "no"}
        elif name == "full" and evaluations and evaluations[0].share > MOST_EVALUATION:
            rows = [basis.run(config, eval_steps=n * evaluations[0].every)[1][0] for n in CADENCES[1:3]]
            every = next((row.every for row in rows if row.share <= MOST_EVALUATION), rows[-1].every)
            grpo = dict.fromkeys(("eval", "save") if best else ("eval",), min(steps, every))
        by_epoch = {f"{key}_strategy": "steps" for key in grpo if grpo_value(f"{key}_strategy", config) != "steps"}
        grpo = {f"{key}_steps": n for key, n in grpo.items()} | by_epoch
        values = {**config.to_dict(), "grpo": {**config.grpo, **grpo, "max_steps": steps}}
        values["output"] = {**values.get("output", {}), "name": f"{config.output.name or 'run'}-{name}"}
        phase = RunConfig.from_dict(values)
        whole = replace(basis, samples=steps * groups_per_step(phase)).run(phase)[0]
        ends = f"Predicted to take {duration(whole.value)} ({duration(whole.low)} to {duration(whole.high)})."
        lines = [f"Written by grpo-autotune plan: {title}.", ends]
        changed = changed_keys(basis.models.base.to_dict(), phase.to_dict())
        lines += [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
        lines += [f"{row.key}: {row.proof}" for row in (phase.receipt.changed if phase.receipt else [])]
        write_whole(folder / f"{name}.yaml", "".join(f"# {line}\n" for line in lines) + phase.to_yaml())
    say(f"Saved: {', '.join(str(folder / f'{name}.yaml') for name in TITLES)}")


def _probed(config: RunConfig, output: AbstractContextManager[None], *, with_eval: bool) -> Path:
    """The probe in the run folder of a configuration: made where there is none of it on this machine, or none
    `with_eval`. Raises as `probe_config`."""
    folder = config.run_dir / "probe"
    stored = load_report(folder) if (folder / REPORT_FILE).is_file() else None
    wanted = config.model_dump(mode="json"), detect().fingerprint
    same = stored is not None and (stored.config, (stored.machine or {}).get("fingerprint")) == wanted
    if stored is None or not same or (with_eval and not stored.occasions):
        if config.batch.processes > 1:
            fix = f"Probe it under torchrun, then WORLD_SIZE={config.batch.processes} grpo-autotune plan {folder}."
            raise ConfigError("plan runs in one process and probes no several ranks", where="WORLD_SIZE", fix=fix)
        say(f"Probing first, into {folder}; the next plan of this configuration takes that probe.")
        how: Any = {"steps": PROBE_STEPS, "out_dir": folder, "output": output, "with_eval": with_eval}
        probe_config(config, show=lambda report: PrintableReport(report, folder).save(folder), **how)
    return folder


@of_other_processes()
def basis_of_run(source: Path) -> Basis:
    """The basis that a stored run is: a probe, a training run, a script's run, or a search's folder; an error where it
    does not tell enough."""
    report = load_run(source).data
    if isinstance(report, SearchReport):
        return _searched(report, source if source.is_dir() else source.parent)
    record, ranks = record_of(report), report.trainer.world_size
    machine = Machine.model_validate(report.machine) if report.machine else detect()
    try:
        config = RunConfig.from_dict(report.config) if report.config is not None else None
        facts = Facts(record, break_down(record.timings), machine=machine, config=config)
        base, models = facts.base, facts.models
    except NothingSucceeded as error:
        raise ConfigError("this run measured no whole step", where=str(source), fix="Probe again.") from error
    if base is None or base.batch.processes != ranks:
        fix = f"Set WORLD_SIZE={ranks} for the plan."
        raise ConfigError(f"this run had {plural(ranks, 'rank')}", where=str(source), fix=fix)
    if models is None:
        raise ConfigError("this run tells no lengths of completions", where=str(source), fix="Probe again.")
    return Basis(models, str(source), report.occasions, memory_bytes=facts.memory_bytes())


def _searched(search: SearchReport, folder: Path) -> Basis:
    """A search's probe, and models that know its trials."""
    config, machine = RunConfig.from_dict(search.config or {}), Machine.model_validate(search.machine)
    trials = [(spec, outcome) for spec, outcome in SearchFolder(folder).trials() if outcome and outcome.record]
    probe = next((outcome for spec, outcome in trials if spec.purpose == "probe"), None)
    if probe is None or probe.record is None:
        raise ConfigError("the trials of this search are gone", where=str(folder), fix="Plan a CONFIG.")
    alone, memory = without_evaluations(probe), memory_of(machine, probe.record.trainer)
    board = Leaderboard(config, search.baseline.knobs, alone.record or probe.record)
    alone, rows = evened(board, board.baseline_knobs, alone), {row.number: row.knobs for row in search.trials}
    models = Models.from_probe(config, alone.record or probe.record, machine, alone)
    board.add(board.baseline_knobs, alone, None)
    timed = list[tuple[TrialSpec, Knobs, TrialOutcome]]()
    for spec, outcome in trials:
        # a script's trial has only those keys in its order that the script is given
        knobs = rows.get(spec.number) if spec.script else {**board.baseline_knobs, **spec.knobs}
        if spec.purpose != "timed" or knobs is None:
            continue
        outcome = without_evaluations(outcome)
        if spec.place is not None:
            if not board.changed(knobs):
                board.see_place(spec.place, at_expected(board, knobs, outcome))
            outcome = faster(outcome, board.paces[spec.place].at(math.inf) if spec.place in board.paces else 1.0)
        board.rows.learn(knobs, outcome)
        timed.append((spec, knobs, outcome))
    for spec, knobs, outcome in timed:
        if spec.source != "race":
            models = models.learn(with_knobs(config, knobs), at_expected(board, knobs, outcome))
    return Basis(models, str(folder), seconds_once(probe.record), memory_bytes=memory)


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
