"""Runs held against each other of which some are known by a log alone: on the rows that both can tell."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from grpo_autotune.records.comparison import Comparison, Pair, RatioRow
from grpo_autotune.records.imported import ATOMS, TRAINING_PASS, LogReport
from grpo_autotune.records.probe import cycle_means
from grpo_autotune.report.compare import DRIFT_CPU, DRIFT_GPU, ON_HOST, Run, facts_of, half_interval, ratio_row

UNTIMED = {"data", "prompt", "tools", "optimizer", "log_save_eval", "sync_wait"}
"""Stages that a run has although its log may not time them; others that are absent did not run."""
TOGETHER = frozenset(("policy_logprob.training_forward", "backward", "optimizer", "sync_wait"))


class LogRun(NamedTuple):
    """A run that is known by its log."""

    name: str
    report: LogReport


class Cell(NamedTuple):
    """Seconds of some stages that cannot be told apart, per step and of each step."""

    atoms: frozenset[str]
    self_s: float
    per_step_s: Sequence[float]


def compare_logs(runs: Sequence[Run | LogRun], confidence: float = 0.9) -> Comparison:
    """Hold every run against the first."""
    pairs = [_pair(runs[0], run, confidence) for run in runs[1:]]
    return Comparison(confidence=confidence, baseline=runs[0].name, pairs=pairs)


def _pair(a: Run | LogRun, b: Run | LogRun, confidence: float) -> Pair:
    sides, told = (a, b), ["a log names no machine: seconds may differ by that alone"]
    left_out = [_untimed(run) for run in reversed(sides)]  # in one of them, since the other does not time it
    cells = [[cell for cell in _cells(run) if not cell.atoms <= out] for run, out in zip(sides, left_out, strict=True)]
    for run, out, kept in zip(sides, left_out, cells, strict=True):
        dropped = sorted(atom for cell in _cells(run) for atom in cell.atoms if cell.atoms <= out)
        if dropped:
            told.append(f"not compared, since the other's log does not time it: {', '.join(dropped)} of {run.name}")
        if not kept:
            told.append(f"{run.name} has seconds of whole steps alone, so only these are compared")
    counts = [_completions(run) for run in sides]
    factor = 1.0
    if counts[0] and counts[1] and counts[0] != counts[1]:
        factor = counts[0] / counts[1]
        told.append(f"a step has {counts[0]:g} completions and {counts[1]:g}: compared per completion")
    rows = list(_rows(sides, cells, factor, confidence))
    both = [_facts(run) for run in sides]
    return Pair(
        run=b.name, steps=[len(run.report.step_seconds) for run in sides], apart=list(_apart(a, b, counts)),
        differences=told, changed={}, rows=rows,
        facts={name: [one.get(name) for one in both] for name in {**both[0], **both[1]}},
    )  # fmt: skip


def _rows(
    sides: tuple[Run | LogRun, Run | LogRun], cells: list[list[Cell]], factor: float, confidence: float
) -> Iterator[RatioRow]:
    """The step, then the finest rows that both sides have, the longest first."""
    whole = [_whole(run, kept) for run, kept in zip(sides, cells, strict=True)]
    step_s = whole[0].self_s
    groups = _common([cell.atoms for kept in cells for cell in kept]) if all(cells) else []
    each = confidence ** (1.0 / max(1, len(groups)))
    yield _row("step", whole, factor, confidence, step_s)
    rows = [_row(_name(group), [_sum(kept, group) for kept in cells], factor, each, step_s) for group in groups]
    yield from sorted(rows, key=lambda row: -max(row.before_s, row.after_s))


def _row(name: str, pair: Sequence[Cell], factor: float, confidence: float, step_s: float) -> RatioRow:
    least = DRIFT_CPU if name in ON_HOST else DRIFT_GPU
    timed = all(cell.self_s > 0.0 for cell in pair)
    half = math.hypot(*(half_interval([*c.per_step_s], least, confidence) for c in pair)) if timed else math.inf
    return ratio_row(name, (pair[0].self_s, pair[1].self_s), factor, half, step_s)


def _cells(run: Run | LogRun) -> list[Cell]:
    """A run's rows; a timer of a log's own may hold all that its others do not; a probe's log-prob passes are apart."""
    if isinstance(run, LogRun):
        log = run.report
        return [Cell(frozenset(row.holds or (row.name, *log.absent)), row.self_s, row.per_step_s) for row in log.stages]
    cells = []
    for row in run.report.stages:
        per_step_s = cycle_means(row.per_step_s, run.report.cycle)
        atoms = {row.name: row.self_s}
        if row.name == "policy_logprob":
            old_s = sum(part.self_s for part in row.parts if part.name == "old_policy")
            atoms = {"policy_logprob.old_policy": old_s, "policy_logprob.training_forward": row.self_s - old_s}
        for atom, spent in atoms.items():
            share = spent / row.self_s if row.self_s else 0.0
            cells += [Cell(frozenset((atom,)), spent, [s * share for s in per_step_s])] if spent > 0.0 else []
    return cells


def _whole(run: Run | LogRun, kept: list[Cell]) -> Cell:
    """A run's step; where it has rows, their sum, without those that are left out."""
    steps = cycle_means(run.report.step_seconds, run.report.cycle)
    everything = frozenset[str]().union(*(cell.atoms for cell in kept))
    return _sum(kept, everything) if kept else Cell(everything, run.report.step_s, steps)


def _sum(cells: list[Cell], group: frozenset[str]) -> Cell:
    inside = [cell for cell in cells if cell.atoms <= group]
    per_step_s = [math.fsum(spent) for spent in zip(*(cell.per_step_s for cell in inside), strict=True)]
    return Cell(group, math.fsum(cell.self_s for cell in inside), per_step_s)


def _common(sets: list[frozenset[str]]) -> list[frozenset[str]]:
    """The finest groups that no set lies across."""
    groups: list[frozenset[str]] = []
    for atoms in sets:
        touching = [group for group in groups if group & atoms]
        groups = [group for group in groups if not group & atoms] + [atoms.union(*touching)]
    return groups


def _name(group: frozenset[str]) -> str:
    order = [atom for atom in (*ATOMS, "other") if atom in group]
    strange = sorted(group - {*order})
    return TRAINING_PASS if group == TOGETHER else " + ".join([*strange, "what it may hold"] if strange else order)


def _untimed(run: Run | LogRun) -> set[str]:
    return UNTIMED & {*run.report.absent} if isinstance(run, LogRun) and run.report.stages else set()


def _completions(run: Run | LogRun) -> float | None:
    if not isinstance(run, LogRun):
        return run.report.trainer.rows
    fact = run.report.facts.get("completions per step")
    return fact.value if fact else None


def _facts(run: Run | LogRun) -> dict[str, float]:
    if isinstance(run, LogRun):
        shares = ("completions cut off", "groups of equal rewards")
        return {
            f"{k}, %" if k in shares else k: f.value * (100.0 if k in shares else 1.0)
            for k, f in run.report.facts.items()
        }
    return facts_of(run)


def _apart(a: Run | LogRun, b: Run | LogRun, counts: list[float | None]) -> Iterator[str]:
    logs = [run for run in (a, b) if isinstance(run, LogRun)]
    gpus = [run.report.facts["GPUs"].value for run in logs if "GPUs" in run.report.facts]
    if len(logs) == 1:
        yield f"{logs[0].name} names no machine: seconds of two machines may stand beside each other"
    if len({*gpus}) > 1:
        yield f"the logs are of {gpus[0]:g} and {gpus[1]:g} GPUs: seconds cannot be compared"
    if None in counts:
        yield "completions per step are not in every log: seconds are as they are, whatever a step holds"
