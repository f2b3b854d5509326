"""The leaderboard: entries are replaced and never changed, and one place turns them into rows and receipts."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.receipt import ChangedKnob
from grpo_autotune.records.report import Change
from grpo_autotune.records.search import Contribution, Guard
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.leaderboard import Entry, Leaderboard, RaceResult
from grpo_autotune.search.summary import candidate
from tests.support.paper_machine import GIB, record_of, user_config

SIZE = "data.image_size"


def leaderboard() -> Leaderboard:
    """The user's configuration at 2 s per step."""
    board = Leaderboard(user_config(), {SIZE: 512}, record_of(user_config()))
    board.add({SIZE: 512}, outcome([2.0, 2.0, 2.0]), None)
    return board


def outcome(step_s: list[float], **more: Any) -> TrialOutcome:
    return TrialOutcome(number=7, status="ok", record=record_of(user_config()), step_s=step_s, **more)


def rival(board: Leaderboard) -> Entry:
    return board.add({SIZE: 256}, outcome([1.0, 1.0, 1.0], peak_bytes=3 * GIB), 1.1)


def test_an_entry_is_replaced_and_never_changed() -> None:
    board = leaderboard()
    first = rival(board)
    with pytest.raises(FrozenInstanceError):
        first.fails = "no"  # type: ignore[misc]
    later = board.add_peak(first, 4 * GIB)
    assert first.peak_bytes == 3 * GIB and later.peak_bytes == 4 * GIB
    assert board.entry({SIZE: 256}) is later
    assert board.add_peak(later, None).peak_bytes == 4 * GIB


def test_the_worst_case_counts_as_passed_as_failed_or_not_at_all() -> None:
    board = leaderboard()
    entry = rival(board)
    assert board.add_worst_case(entry, TrialOutcome(number=8, status="timeout")) is entry
    passed = board.add_worst_case(entry, TrialOutcome(number=8, status="ok", peak_bytes=5 * GIB))
    assert passed.worst_case == "passed" and passed.peak_bytes == 5 * GIB
    failed = board.add_worst_case(entry, TrialOutcome(number=8, status="oom", why="full"))
    assert failed.fails == "the worst-case step ended with oom: full"
    assert board.ranking("fast") == [board.baseline]


def test_the_row_of_a_raced_entry_is_the_races() -> None:
    board = leaderboard()
    entry = rival(board)
    row = candidate(board, entry)
    assert (row.speedup, row.step_s, row.baseline_step_s, row.raced) == (2.0, 1.0, 2.0, False)
    result = RaceResult(Interval(1.5, 1.4, 1.6, 5), Interval(2.0, 1.9, 2.1, 5), Interval(3.0, 2.9, 3.1, 5))
    row = candidate(board, board.update(entry, race=result))
    assert (row.speedup, row.ci, row.raced) == (1.5, [1.4, 1.6], True)
    assert (row.step_s, row.step_s_ci, row.steps, row.baseline_step_s) == (2.0, [1.9, 2.1], 5, 3.0)
    assert row.predicted_s == 1.1 and row.number == 7 and row.peak_bytes == 3 * GIB


def test_a_change_has_the_same_keys_wherever_it_is_written() -> None:
    keys = list(Change.model_fields)
    assert keys == ["key", "before", "after"]
    for record in (Guard, Contribution, ChangedKnob):
        assert list(record.model_fields)[:3] == keys
