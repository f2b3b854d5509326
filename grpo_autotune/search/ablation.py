"""Ablation of a winner: its score over that of the winner with one change taken back, measured or predicted."""

from __future__ import annotations

import math

from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.predict.room import fits
from grpo_autotune.records.search import Contribution
from grpo_autotune.search.acquisition import Models
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.leaderboard import Entry, Leaderboard
from grpo_autotune.search.study import name_of


def measure_ablations(evaluator: Evaluator, winner: Entry) -> None:
    """Measure the winner with each change taken back, the largest predicted part first, while time is left."""
    board, budget = evaluator.board, evaluator.budget
    ablated = {key: board.without(winner.knobs, key) for key in board.changed(winner.knobs)}
    parts = {
        key: contribution(board, evaluator.models, evaluator.machine, winner, key).factor
        for key, knobs in ablated.items()
        if board.entry(knobs) is None
    }
    for key in sorted(parts, key=lambda key: -abs(math.log(parts[key] or 1.0))):
        knobs = ablated[key]
        if parts[key] is None or not fits(evaluator.models, board.config_of(knobs), evaluator.log.memory_bytes):
            continue
        if evaluator.affords(knobs, budget.left_s):
            evaluator.timed(knobs, "revert", budget.left_s)


def contributions(board: Leaderboard, models: Models, machine: Machine, winner: Entry) -> list[Contribution]:
    """One row per change of the winner, largest first."""
    rows = [contribution(board, models, machine, winner, key) for key in board.changed(winner.knobs)]
    return sorted(rows, key=lambda row: -(row.factor or 0.0))


def contribution(board: Leaderboard, models: Models, machine: Machine, winner: Entry, key: str) -> Contribution:
    """Part of one change in the winner's score."""
    knobs = board.without(winner.knobs, key)
    row = Contribution(key=key, before=board.baseline_knobs[key], after=winner.knobs[key], kind=board.kind(key))
    ablated = board.entry(knobs)
    if ablated is None:
        why = why_not(board.config, knobs, machine)
        factor = None if why is not None else _predicted(board, models, knobs, winner.knobs)
        return row.model_copy(update={"factor": factor, "why": why})
    raced = len(board.changed(winner.knobs)) == 1 and winner.race is not None  # against this very combination
    ratio = board.speedup(winner) if raced else board.ratio(ablated, winner)
    ends = {"low": ratio.low, "high": ratio.high} if raced or ratio.n > 1 else {}
    return row.model_copy(update={"factor": ratio.value, "measured": True, **ends})


def exact_share(board: Leaderboard, models: Models, machine: Machine, winner: Entry) -> float | None:
    """Part of the logarithm of the winner's gain that its exact knobs bring; None without a gain.

    The part of its learning knobs together is measured, or predicted, as one change's part is, and taken off the gain.
    """
    learning, total = board.learning(winner.knobs), board.speedup(winner).value
    if winner is board.baseline or total <= 1.0:
        return None
    if not learning:
        return 1.0
    knobs = board.without(winner.knobs, *learning)
    if name_of(knobs) == name_of(board.baseline_knobs):
        return 0.0
    ablated = board.entry(knobs)
    if ablated is not None:
        factor = board.ratio(ablated, winner).value
    elif why_not(board.config, knobs, machine) is None:
        factor = _predicted(board, models, knobs, winner.knobs)
    else:
        return None
    return min(1.0, max(0.0, 1.0 - math.log(factor) / math.log(total)))


def _predicted(board: Leaderboard, models: Models, slower: Knobs, faster: Knobs) -> float:
    """Score of one combination over that of another, by the models."""
    before, after = board.config_of(slower), board.config_of(faster)
    steps = models.step_s(before).value / models.step_s(after).value
    return steps * board.worth(after) / board.worth(before)
