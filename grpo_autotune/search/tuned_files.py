"""The tuned configurations: complete, loadable as they are, each with the receipt of what was measured."""

from __future__ import annotations

import shlex
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.yaml_text import write_yaml
from grpo_autotune.files import write_whole
from grpo_autotune.hardware import Machine
from grpo_autotune.records.receipt import ChangedKnob, Receipt
from grpo_autotune.records.search import Candidate, SearchReport
from grpo_autotune.scripts.stand_in import overrides
from grpo_autotune.search.evaluator import Lab, plain
from grpo_autotune.search.leaderboard import Book
from grpo_autotune.units import hms

TITLES = {
    "exact": "the fastest found with everything that decides what is learned as it was",
    "tuned": "the fastest found that is shown, or was accepted, to learn the same",
    "fast": "the fastest found, changes included that are not shown to learn the same",
}


def emit(lab: Lab, report: SearchReport) -> None:
    """Write the three files, and the copy of `tuned.yaml` that was asked for."""
    chosen = {"exact": report.best_exact, "tuned": report.best, "fast": report.best_fast}
    for which, candidate in chosen.items():
        text = tuned_text(lab, report, which, candidate)
        write_whole(lab.folder.tuned(which), text)
        if which == "tuned" and lab.out is not None:
            lab.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(lab.out, text)


def tuned_text(lab: Lab, report: SearchReport, which: str, candidate: Candidate) -> str:
    """One file: a head for people, then the configuration."""
    receipt = receipt_of(lab.book, lab.machine, report, candidate)
    values = script_values(lab, candidate, receipt) if lab.script else tuned_config(lab, candidate, receipt).to_dict()
    return "".join(f"# {line}\n" for line in _head(report, which, candidate, lab.script)) + write_yaml(values)


def tuned_config(lab: Lab, candidate: Candidate, receipt: Receipt) -> RunConfig:
    """The user's configuration with the candidate's knobs, a name of its own, and the receipt."""
    values = plain(lab.book.config_of(candidate.knobs))
    output = values.get("output", {})
    if output.get("name"):
        values["output"] = {**output, "name": f"{output['name'].removesuffix('-tuned')}-tuned"}
    return RunConfig.from_dict({**values, "receipt": receipt.model_dump()})


def script_values(lab: Lab, candidate: Candidate, receipt: Receipt) -> dict[str, Any]:
    """For a script: what its trainer has to be given, by section, and the receipt."""
    values: dict[str, Any] = {}
    for key, value in overrides(lab.config, lab.book.config_of(candidate.knobs)).items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    return {**values, "receipt": receipt.model_dump(exclude_defaults=True)}


def receipt_of(book: Book, machine: Machine, report: SearchReport, candidate: Candidate) -> Receipt:
    """What was measured of a candidate, where, and what was changed for it."""
    return Receipt(
        machine=machine.fingerprint,
        hardware=_hardware(machine),
        versions=machine.versions,
        step_s=candidate.step_s,
        step_s_low=candidate.step_s_ci[0],
        step_s_high=candidate.step_s_ci[1],
        steps=candidate.steps,
        predicted_step_s=candidate.predicted_s,
        baseline_step_s=candidate.baseline_step_s,
        speedup=candidate.speedup,
        speedup_low=candidate.ci[0],
        speedup_high=candidate.ci[1],
        raced=candidate.raced,
        confidence=report.confidence,
        peak_bytes=candidate.peak_bytes,
        worst_case=candidate.worst_case,
        changed=[_changed(book, key, value) for key, value in candidate.changed.items()],
    )


def _changed(book: Book, key: str, value: Any) -> ChangedKnob:
    guard = book.guard(key, value)
    plain_: dict[str, Any] = {"key": key, "before": book.own[key], "after": value}
    if guard is not None:
        plain_ |= {
            "reward_difference": guard.reward_difference,
            "reward_low": guard.reward_low,
            "reward_high": guard.reward_high,
            "prompts_needed": guard.prompts_needed,
        }
    return ChangedKnob(kind=book.kind(key), proof=book.proof(key, value), **plain_)


def _head(report: SearchReport, which: str, candidate: Candidate, script: list[str] | None) -> list[str]:
    found = f"Written by grpo-autotune search: {TITLES[which]}."
    if not candidate.changed:
        found = f"Written by grpo-autotune search: your own configuration; nothing else was better ({which})."
    how = "predicted, not measured" if report.predicted else "measured"
    speed = f"x {candidate.speedup:.2f} ({candidate.ci[0]:.2f} to {candidate.ci[1]:.2f}) useful completions a second"
    lines = [found, f"{speed}, {how}, after {hms(report.elapsed_s)} of search; the receipt says what and where."]
    if script:
        lines.append(f"Values for the trainer of {script[0]}: grpo-autotune run --with THIS_FILE {shlex.join(script)}")
    return lines


def _hardware(machine: Machine) -> str:
    gpus = ", ".join(gpu.name for gpu in machine.gpus)
    cpu = f"{machine.cores} cores of {machine.cpu}, {machine.memory_bytes / 2**30:.0f} GiB"
    return f"{gpus}; {cpu}" if gpus else cpu
