"""Ablation of a winner: its score over that of the winner with one change taken back, measured or predicted.

Noise is booked to no change: none brings more than the stages that it reaches could (Amdahl), and what is only
predicted shares the measured gain that the measured changes leave.
"""

import math

from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.predict.room import fits
from grpo_autotune.records.search import Contribution
from grpo_autotune.search.acquisition import run_s
from grpo_autotune.search.evaluator import Evaluator, is_alone
from grpo_autotune.search.leaderboard import TIE, Entry

SMALL = 1.1
"""A gain that is predicted, or measured by trials at different times, to be less may turn out to be nothing."""


def measure_ablations(evaluator: Evaluator, winner: Entry, kept_s: float) -> None:
    """Measure the winner with each change taken back, the largest predicted part first, while time is left, and
    `kept_s` with it where the outcome may lead."""
    rows = [contribution(evaluator, winner, key) for key in evaluator.board.changed(winner.knobs)]
    for row in sorted(rows, key=lambda row: -abs(math.log(row.factor or 1.0))):
        knobs = evaluator.board.without(winner.knobs, row.key)
        if row.factor is not None and not (row.measured and is_alone(evaluator.board.entry(knobs))):
            room_s = evaluator.budget.left_s - (kept_s if row.factor < SMALL else 0.0)
            taken_back(evaluator, knobs, room_s)


def taken_back(evaluator: Evaluator, knobs: Knobs, room_s: float) -> Entry | None:
    """The entry of a combination, measured alone where it fits into memory and into `room_s` seconds; None without
    one."""
    entry, memory_bytes = evaluator.board.entry(knobs), evaluator.log.memory_bytes
    rows = (row for row in evaluator.log.rows if row.place is None and row.source != "race")
    tried = is_alone(entry) or any(row.knobs == knobs for row in rows)
    config = evaluator.board.config_of(knobs)
    if tried or not fits(evaluator.models, config, memory_bytes) or not evaluator.affords(knobs, room_s):
        return entry
    return evaluator.timed(knobs, "revert", room_s)


def simpler(evaluator: Evaluator, winner: Entry) -> Knobs:
    """The winner's combination without changes that bring nothing, as measured, or as predicted of all together."""
    board, knobs = evaluator.board, winner.knobs
    rows = [contribution(evaluator, winner, key) for key in board.changed(winner.knobs)]
    for row in sorted(rows, key=lambda row: row.factor or 0.0):
        fewer = board.without(knobs, row.key)
        if row.factor is None or _why_not(evaluator, fewer) is not None:
            continue
        part = row.factor if row.measured else _predicted(evaluator, fewer, winner)
        if min(part, _most(evaluator, row.key, winner)) < 1.0 + TIE and (row.low is None or row.low <= 1.0):
            knobs = fewer
    return knobs


def contributions(evaluator: Evaluator, winner: Entry) -> list[Contribution]:
    """One row per change of the winner, largest first. Where the measured ones multiply to more than the gain, for they
    overlap or the machine was faster then, they are its parts in proportion; those that are predicted to bring
    something share what is left."""
    rows = [contribution(evaluator, winner, key) for key in evaluator.board.changed(winner.knobs)]
    gain = math.log(evaluator.board.speedup(winner).value)
    measured = math.fsum(math.log(row.factor) for row in rows if row.measured and row.factor)
    predicted = {row.key: math.log(row.factor) for row in rows if not row.measured and row.factor}
    predicted = {key: part if part > math.log(1.0 + TIE) else 0.0 for key, part in predicted.items()}
    shrink = min(1.0, max(0.0, gain) / measured) if measured > 0.0 else 1.0
    share = max(0.0, gain - measured) / (math.fsum(predicted.values()) or 1.0)

    def scaled(row: Contribution) -> Contribution:
        if row.measured:
            ends = {name: getattr(row, name) for name in ("factor", "low", "high")}
            return row.model_copy(update={name: None if end is None else end**shrink for name, end in ends.items()})
        part = predicted.get(row.key)
        most = None if part is None else min(math.exp(part * share), _most(evaluator, row.key, winner))
        return row.model_copy(update={"factor": most})

    return sorted(map(scaled, rows), key=lambda row: -(row.factor or 0.0))


def contribution(evaluator: Evaluator, winner: Entry, key: str) -> Contribution:
    """Part of one change in the winner's score."""
    board = evaluator.board
    knobs = board.without(winner.knobs, key)
    row = Contribution(key=key, before=board.baseline_knobs[key], after=winner.knobs[key], kind=board.kind(key))
    ablated = board.entry(knobs)
    if ablated is None:
        why = _why_not(evaluator, knobs)
        factor = min(_predicted(evaluator, knobs, winner), _most(evaluator, key, winner)) if why is None else None
        return row.model_copy(update={"factor": factor, "why": why})
    raced = len(board.changed(winner.knobs)) == 1 and winner.race is not None  # against this very combination
    ratio = board.speedup(winner) if raced else board.ratio(ablated, winner)
    ends = {"low": ratio.low, "high": ratio.high} if raced or ratio.n > 1 else {}
    return row.model_copy(update={"factor": ratio.value, "measured": True, **ends})


def exact_share(evaluator: Evaluator, winner: Entry, rows: list[Contribution]) -> float | None:
    """Part of the logarithm of the winner's gain that its exact knobs bring, all but what its learning knobs do; None
    without a gain, or where it is not known."""
    total, learning = evaluator.board.speedup(winner).value, [row for row in rows if row.kind == "learning"]
    if not rows or total <= 1.0 or any(row.factor is None for row in learning):
        return None
    part = math.fsum(math.log(row.factor or 1.0) for row in learning) / math.log(total)
    return min(1.0, max(0.0, 1.0 - part)) if len(learning) < len(rows) else 0.0


def _why_not(evaluator: Evaluator, knobs: Knobs) -> str | None:
    return why_not(evaluator.board.config, knobs, evaluator.machine)


def _most(evaluator: Evaluator, key: str, winner: Entry) -> float:
    board = evaluator.board
    return board.most([key], board.entry(board.without(winner.knobs, key)) or board.baseline, winner)


def _predicted(evaluator: Evaluator, slower: Knobs, faster: Entry) -> float:
    """Score of an entry over that of another combination, by the models."""
    board, config = evaluator.board, evaluator.board.config_of(slower)
    before, after = (run_s(board, evaluator.models, one).value for one in (config, faster.config))
    return before / after * board.worth(faster.config) / board.worth(config)
