"""What each change of a winner brings: the winner with that one change taken back, measured or predicted."""

from __future__ import annotations

import math

from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.predict.objective import Interval
from grpo_autotune.predict.room import LEAST_CHANCE, chance_to_fit
from grpo_autotune.records.search import Contribution
from grpo_autotune.search.acquisition import Models
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.evaluator import Lab
from grpo_autotune.search.leaderboard import Book, Entry, median_ratio, scaled
from grpo_autotune.search.study import name_of


def measure_reverts(lab: Lab, winner: Entry) -> None:
    """Measure the winner with each change taken back, those first that the models find largest, while time is left."""
    book = lab.book
    open_ = [key for key in book.changed(winner.knobs) if name_of(reverted(book, winner, key)) not in book.entries]
    sized = [(contribution(lab, winner, key), key) for key in open_]
    for found, key in sorted(sized, key=lambda pair: -abs(math.log(pair[0].factor or 1.0))):
        knobs = reverted(book, winner, key)
        if found.factor is None or _too_large(lab, knobs):
            continue
        if SURE * lab.expected_s(knobs) <= lab.budget.left_s:
            lab.timed(knobs, "revert", lab.budget.left_s)


def contributions(lab: Lab, winner: Entry) -> list[Contribution]:
    """One row a change of the winner, largest first."""
    rows = [contribution(lab, winner, key) for key in lab.book.changed(winner.knobs)]
    return sorted(rows, key=lambda row: -(row.factor or 0.0))


def contribution(lab: Lab, winner: Entry, key: str) -> Contribution:
    """What one change brings."""
    book, knobs = lab.book, reverted(lab.book, winner, key)
    kind = book.kind(key)
    before, after = book.own[key], winner.knobs[key]
    why = why_not(book.config, knobs, lab.machine)
    there = book.entries.get(name_of(knobs))
    if there is not None and (len(book.changed(winner.knobs)) > 1 or winner.raced is None):
        found = _measured(book, there, winner)
        sure = found.n > 1
        low, high = (found.low, found.high) if sure else (None, None)
        return Contribution(
            key=key, before=before, after=after, kind=kind, factor=found.value, low=low, high=high, measured=True
        )
    if there is not None:
        found = book.speedup(winner)
        return Contribution(
            key=key, before=before, after=after, kind=kind,
            factor=found.value, low=found.low, high=found.high, measured=True,
        )  # fmt: skip
    factor = None if why is not None else _predicted(book, lab.models, knobs, winner.knobs)
    return Contribution(
        key=key, before=before, after=after, kind=kind, factor=factor, low=None, high=None, measured=False, why=why
    )


def exact_share(lab: Lab, winner: Entry) -> float | None:
    """Part of the logarithm of the winner's gain that its exact knobs bring; null without a gain.

    What its learning knobs bring together is measured, or predicted, as one change's part is, and taken off the gain.
    """
    book = lab.book
    learning, total = book.learning(winner.knobs), book.speedup(winner).value
    if winner is book.baseline or total <= 1.0:
        return None
    if not learning:
        return 1.0
    knobs = {**winner.knobs, **{key: book.own[key] for key in learning}}
    if name_of(knobs) == name_of(book.own):
        return 0.0
    there = book.entries.get(name_of(knobs))
    if there is not None:
        brings = _measured(book, there, winner).value
    elif why_not(book.config, knobs, lab.machine) is None:
        brings = _predicted(book, lab.models, knobs, winner.knobs)
    else:
        return None
    return min(1.0, max(0.0, 1.0 - math.log(brings) / math.log(total)))


def reverted(book: Book, winner: Entry, key: str) -> Knobs:
    """The winner's knobs with one as the user has it."""
    return {**winner.knobs, key: book.own[key]}


def _measured(book: Book, slower: Entry, faster: Entry) -> Interval:
    """Score of one entry over that of another, each by the trials of its own."""
    worth = book.worth(faster.config) / book.worth(slower.config)
    return scaled(median_ratio(slower.cycles_s, faster.cycles_s, book.confidence), worth)


def _predicted(book: Book, models: Models, slower: Knobs, faster: Knobs) -> float:
    """Score of one combination over that of another, by the models."""
    before, after = book.config_of(slower), book.config_of(faster)
    steps = models.step_s(before).value / models.step_s(after).value
    return steps * book.worth(after) / book.worth(before)


def _too_large(lab: Lab, knobs: Knobs) -> bool:
    return chance_to_fit(lab.models, lab.book.config_of(knobs), lab.memory_bytes) < LEAST_CHANCE
