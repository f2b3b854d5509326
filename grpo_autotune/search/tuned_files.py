"""The tuned configurations: complete, loadable as they are, each with the receipt of what was measured."""

import shlex
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.yaml_text import write_yaml
from grpo_autotune.files import write_whole
from grpo_autotune.hardware import Machine
from grpo_autotune.records.receipt import ChangedKnob, Receipt
from grpo_autotune.records.report import Change
from grpo_autotune.records.search import Candidate, SearchReport
from grpo_autotune.scripts.stand_in import overrides
from grpo_autotune.search.leaderboard import Leaderboard
from grpo_autotune.search.trial_log import Task, plain
from grpo_autotune.units import hms, plural

TITLES = {
    "exact": "the fastest found with everything that decides what is learned as it was",
    "tuned": "the fastest found that is shown, or was accepted, to learn the same",
    "fast": "the fastest found, changes included that are not shown to learn the same",
}


def write_tuned(task: Task, board: Leaderboard, report: SearchReport) -> None:
    """Write the three files, and the copy of `tuned.yaml` that was asked for."""
    chosen = {"exact": report.best_exact, "tuned": report.best, "fast": report.best_fast}
    for which, candidate in chosen.items():
        text = tuned_text(task, board, report, which, candidate)
        write_whole(task.folder.tuned(which), text)
        if which == "tuned" and task.out is not None:
            task.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(task.out, text)


def tuned_text(task: Task, board: Leaderboard, report: SearchReport, which: str, candidate: Candidate) -> str:
    """One file: a head for people, then the configuration, or a script's values."""
    receipt = receipt_of(board, task.machine, report, candidate)
    if task.script:
        values = script_values(board, candidate, receipt)
    else:
        values = tuned_config(board, candidate, receipt).to_dict()
    return "".join(f"# {line}\n" for line in _head(report, which, candidate, task.script)) + write_yaml(values)


def tuned_config(board: Leaderboard, candidate: Candidate, receipt: Receipt) -> RunConfig:
    """The user's configuration with the candidate's knobs, a name of its own, and the receipt."""
    values = plain(board.config_of(candidate.knobs))
    output = values.get("output", {})
    if output.get("name"):
        values["output"] = {**output, "name": f"{output['name'].removesuffix('-tuned')}-tuned"}
    return RunConfig.from_dict({**values, "receipt": receipt.model_dump()})


def script_values(board: Leaderboard, candidate: Candidate, receipt: Receipt) -> dict[str, Any]:
    """The values that a script's trainer has to be given, by section, and the receipt."""
    values: dict[str, Any] = {}
    for key, value in overrides(board.config, board.config_of(candidate.knobs)).items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    return {**values, "receipt": receipt.model_dump(exclude_defaults=True)}


def receipt_of(board: Leaderboard, machine: Machine, report: SearchReport, candidate: Candidate) -> Receipt:
    """Receipt of a candidate: its measurement, where it was made, and what was changed for it."""
    same = candidate.model_dump(include=Receipt.model_fields.keys() - {"changed"})
    return Receipt(
        machine=machine.fingerprint,
        hardware=_hardware(machine),
        versions=machine.versions,
        runtime=board.record.runtime,
        processes=board.config.batch.processes,
        step_s_low=candidate.step_s_ci[0],
        step_s_high=candidate.step_s_ci[1],
        predicted_step_s=candidate.predicted_s,
        speedup_low=candidate.ci[0],
        speedup_high=candidate.ci[1],
        confidence=report.confidence,
        changed=[_changed(board, key, value) for key, value in candidate.changed.items()],
        **same,
    )


def _changed(board: Leaderboard, key: str, value: Any) -> ChangedKnob:
    guard = board.guard(key, value) or Change(key=key, before=board.baseline_knobs[key], after=value)
    same = guard.model_dump(include=set(ChangedKnob.model_fields))
    return ChangedKnob(kind=board.kind(key), proof=board.evidence(key, value), **same)


def _head(report: SearchReport, which: str, candidate: Candidate, script: list[str] | None) -> list[str]:
    title = f"Written by grpo-autotune search: {TITLES[which]}."
    if not candidate.changed:
        title = f"Written by grpo-autotune search: your own configuration; nothing else was better ({which})."
    how = "predicted, not measured" if report.predicted else "measured"
    speed = f"x {candidate.speedup:.2f} ({candidate.ci[0]:.2f} to {candidate.ci[1]:.2f}) useful completions per second"
    lines = [title, f"{speed}, {how}, after {hms(report.elapsed_s)} of search; the receipt says what and where."]
    if script:
        lines.append(f"Values for the trainer of {script[0]}: grpo-autotune run --with THIS_FILE {shlex.join(script)}")
    return lines


def _hardware(machine: Machine) -> str:
    gpus = ", ".join(gpu.name for gpu in machine.gpus)
    cpu = f"{plural(machine.cores, 'core')} of {machine.cpu}, {machine.memory_bytes / 2**30:.0f} GiB"
    return f"{gpus}; {cpu}" if gpus else cpu
