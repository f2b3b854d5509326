"""Runs held against each other of which some are known by a log alone: on the rows that both can tell."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from grpo_autotune.records.comparison import Comparison, Pair, RatioRow
from grpo_autotune.records.imported import ATOMS, TRAINING_PASS, LogReport
from grpo_autotune.records.probe import cycle_means
from grpo_autotune.report.compare import DRIFT_CPU, DRIFT_GPU, ON_HOST, Run, facts_of, half_interval, ratio_row

UNTIMED = {"data", "prompt", "tools", "optimizer", "log_save_eval", "sync_wait"}  # stages that run untimed
ROWS = "completions per step"
SHARES = ("completions cut off", "groups of equal rewards")
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


class Side(NamedTuple):
    """A run, of either kind, as it is compared."""

    name: str
    step: Cell
    cells: list[Cell]
    untimed: set[str]  # stages that it has although its log does not time them
    facts: dict[str, float]
    is_log: bool


def compare_logs(runs: Sequence[Run | LogRun], confidence: float = 0.9) -> Comparison:
    """Hold every run against the first."""
    first, *others = [_of_log(run) if isinstance(run, LogRun) else _of_probe(run) for run in runs]
    return Comparison(
        confidence=confidence, baseline=first.name, pairs=[_pair(first, other, confidence) for other in others]
    )


def _of_log(run: LogRun) -> Side:
    """A timer of a log's own may hold all that its others do not."""
    log = run.report
    cells = [Cell(frozenset(row.holds or (row.name, *log.absent)), row.self_s, row.per_step_s) for row in log.stages]
    shares = {name: f"{name}, %" for name in SHARES}
    facts = {shares.get(k, k): fact.value * (100.0 if k in shares else 1.0) for k, fact in log.facts.items()}
    step = Cell(frozenset(), log.step_s, log.step_seconds)
    return Side(run.name, step, cells, UNTIMED & {*log.absent} if cells else set(), facts, is_log=True)


def _of_probe(run: Run) -> Side:
    """The passes of a probe's log-probs are apart."""
    report = run.report
    cells = []
    for row in report.stages:
        atoms = {row.name: row.self_s}
        if row.name == "policy_logprob":
            old_s = sum(part.self_s for part in row.parts if part.name == "old_policy")
            atoms = {"policy_logprob.old_policy": old_s, "policy_logprob.training_forward": row.self_s - old_s}
        per_step_s = cycle_means(row.per_step_s, report.cycle)
        for atom, spent in atoms.items():
            if spent > 0.0:
                cells.append(Cell(frozenset((atom,)), spent, [s * spent / row.self_s for s in per_step_s]))
    step = Cell(frozenset(), report.step_s, cycle_means(report.step_seconds, report.cycle))
    return Side(run.name, step, cells, set(), {**facts_of(run), ROWS: report.trainer.rows}, is_log=False)


def _pair(a: Side, b: Side, confidence: float) -> Pair:
    told = ["a log names no machine: seconds may differ by that alone"]
    kept = []
    for side, other in ((a, b), (b, a)):
        kept.append([cell for cell in side.cells if not cell.atoms <= other.untimed])
        if dropped := sorted(atom for cell in side.cells for atom in cell.atoms if cell.atoms <= other.untimed):
            told.append(f"not compared, since the other's log does not time it: {', '.join(dropped)} of {side.name}")
        if not kept[-1]:
            told.append(f"{side.name} has seconds of whole steps alone, so only these are compared")
    counts = [side.facts.get(ROWS, 0.0) for side in (a, b)]
    factor = counts[0] / counts[1] if all(counts) else 1.0
    if factor != 1.0:
        told.append(f"a step has {counts[0]:g} completions and {counts[1]:g}: compared per completion")
    return Pair(
        run=b.name, steps=[len(side.step.per_step_s) for side in (a, b)], apart=list(_apart(a, b)),
        differences=told, changed={}, rows=list(_rows((a, b), kept, factor, confidence)),
        facts={name: [a.facts.get(name), b.facts.get(name)] for name in {**a.facts, **b.facts}},
    )  # fmt: skip


def _rows(sides: tuple[Side, Side], kept: list[list[Cell]], factor: float, confidence: float) -> Iterator[RatioRow]:
    """The step, without what is left out, then the finest rows that both sides have, the longest first."""
    groups = _common([cell.atoms for cells in kept for cell in cells]) if all(kept) else []
    everything = frozenset[str]().union(*groups, *(cell.atoms for cells in kept for cell in cells))
    whole = [_sum(cells, everything) if cells else side.step for side, cells in zip(sides, kept, strict=True)]
    step_s = whole[0].self_s
    each = confidence ** (1.0 / max(1, len(groups)))
    yield _row("step", whole, factor, confidence, step_s)
    rows = [_row(_name(group), [_sum(cells, group) for cells in kept], factor, each, step_s) for group in groups]
    yield from sorted(rows, key=lambda row: -max(row.before_s, row.after_s))


def _row(name: str, pair: Sequence[Cell], factor: float, confidence: float, step_s: float) -> RatioRow:
    least = DRIFT_CPU if name in ON_HOST else DRIFT_GPU
    timed = all(cell.self_s > 0.0 for cell in pair)
    half = math.hypot(*(half_interval([*c.per_step_s], least, confidence) for c in pair)) if timed else math.inf
    return ratio_row(name, (pair[0].self_s, pair[1].self_s), factor, half, step_s)


def _sum(cells: list[Cell], group: frozenset[str]) -> Cell:
    inside = [cell for cell in cells if cell.atoms <= group]
    per_step_s = [math.fsum(spent) for spent in zip(*(cell.per_step_s for cell in inside), strict=True)]
    return Cell(group, math.fsum(cell.self_s for cell in inside), per_step_s)


def _common(sets: list[frozenset[str]]) -> list[frozenset[str]]:
    """The finest groups that no set lies across."""
    groups: list[frozenset[str]] = []
    for atoms in sets:
        groups = [g for g in groups if not g & atoms] + [atoms.union(*(g for g in groups if g & atoms))]
    return groups


def _name(group: frozenset[str]) -> str:
    order = [atom for atom in (*ATOMS, "other") if atom in group]
    strange = sorted(group - {*order})
    many = [*strange, "what it may hold"] if strange and len(group) > 1 else strange or order
    return TRAINING_PASS if group == TOGETHER else " + ".join(many)


def _apart(a: Side, b: Side) -> Iterator[str]:
    if a.is_log != b.is_log:
        yield f"{(a if a.is_log else b).name} names no machine: seconds of two machines may stand beside each other"
    gpus = [side.facts["GPUs"] for side in (a, b) if "GPUs" in side.facts]
    if len({*gpus}) > 1:
        yield f"the logs are of {gpus[0]:g} and {gpus[1]:g} GPUs: seconds cannot be compared"
    if not all(side.facts.get(ROWS) for side in (a, b)):
        yield f"{ROWS} are not in every log: seconds are as they are, whatever a step holds"
