"""Combinations that are close: what trials at different times cannot tell apart is decided side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware.places import Place
from grpo_autotune.predict.objective import Interval, median_interval
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.final_race import CLOSE_ROUNDS, FIRST_ROUNDS, MOST_CLOSE_ROUNDS, confidence_of, fewest_rounds
from grpo_autotune.search.leaderboard import Leaderboard, RaceResult
from grpo_autotune.search.session import search
from tests.support.paper_machine import GIB, MACHINE, Listener, PaperModels, PaperTrials, record_of, user_config

MICRO, CHECKPOINTING = "grpo.per_device_train_batch_size", "grpo.gradient_checkpointing"
PLACES = tuple(Place(f"core {number}", cores=(number,), share=0.5) for number in (0, 1))
ROOMY = MACHINE.model_copy(update={"memory_bytes": 32 * GIB})


def config_of(**axes: Any) -> RunConfig:
    values = user_config().to_dict()
    knobs = {"micro": MICRO, "checkpointing": CHECKPOINTING}
    values["search"]["knobs"] = dict.fromkeys(values["search"]["knobs"]) | {
        knobs[name]: axis for name, axis in axes.items()
    }
    return RunConfig.from_dict(values)


class Uneven:
    """Searches whose trials are off by another factor each; in a race only the rounds are. Without checkpointing a step
    takes `gain` times less."""

    def __init__(self, folder: Path, gain: float, off: float, seed: int = 0, lucky: float = 1.0) -> None:
        self.folder, self.gain, self.off, self.lucky = folder, gain, off, lucky
        self.random = np.random.default_rng(seed)
        self.trials = PaperTrials(folder, noise=0.05, lengths=[[3, 4]], act=self.act)
        self.trials.random = np.random.default_rng(100 + seed)

    def act(self, spec: TrialSpec) -> TrialOutcome:
        outcome, plain = self.trials._measured(spec), spec.config["grpo"]["gradient_checkpointing"] is False
        factor = 1.25 / self.gain if plain else 1.0  # the paper machine's own gain is 1.25
        if spec.source != "race":
            factor *= float(np.exp(self.random.normal(0.0, self.off))) / (self.lucky if plain else 1.0)
        return outcome.model_copy(update={"step_s": [factor * s for s in outcome.step_s]})

    def search(self, config: RunConfig, places: tuple[Place, ...] = (), budget_s: float = 500.0) -> SearchReport:
        return search(
            config, budget_s=budget_s, out=None, run_dir=self.folder, view=Listener(), runner=lambda _: self.trials,
            fit=lambda *probe: PaperModels(), clock=self.trials.clock, machine=ROOMY, places=places,
            worker=lambda folder, place: self.trials.worker(1.2), wait=self.trials.wait,
        )  # fmt: skip


def test_a_change_that_only_lucky_trials_favour_is_taken_back(tmp_path: Path) -> None:
    paper = Uneven(tmp_path, gain=1.0, off=0.0, lucky=1.12)
    report = paper.search(config_of(micro=[2, 8], checkpointing=[True, False]))
    assert report.best.changed == {MICRO: 8} and report.best.raced and report.best.worst_case == "passed"


@pytest.mark.parametrize("seed", range(5))
def test_one_worker_and_two_end_with_the_same_winner_whatever_their_trials_noise(tmp_path: Path, seed: int) -> None:
    """By 12 % a trial may be off; micro batch 4 takes a third longer than 8, checkpointing an eighth."""
    config = config_of(micro=[2, 4, 8], checkpointing=[True, False])
    for name, places in (("one", ()), ("two", PLACES)):
        report = Uneven(tmp_path / name, 1.125, 0.12, 10 * seed + len(places)).search(config, places)
        assert report.best.changed == {MICRO: 8, CHECKPOINTING: False}, name


def board_of(*rivals: tuple[dict[str, Any], tuple[float, float, float]]) -> Leaderboard:
    """A leaderboard whose entries were all raced against the user's configuration."""
    config = user_config()
    board = Leaderboard(config, {MICRO: 2, CHECKPOINTING: True}, record_of(config))
    outcome = TrialOutcome(number=0, status="ok", record=record_of(config), step_s=[1.0] * 3)
    board.add(board.baseline_knobs, outcome, None)
    for knobs, (low, value, high) in rivals:
        entry = board.add({**board.baseline_knobs, **knobs}, outcome, None)
        step = Interval(1.0, 1.0, 1.0)
        board.update(entry, race=RaceResult(Interval(value, low, high, 5), step, step), worst_case="passed")
    return board


def test_the_simpler_one_does_not_win_by_the_others_wide_interval() -> None:
    board = board_of(({MICRO: 16, CHECKPOINTING: False}, (3.0, 4.3, 4.7)), ({MICRO: 16}, (3.1, 3.4, 3.8)))
    _, both, micro = board.entries.values()
    assert board.best("exact") is micro, "all that is known are two races at different times"
    assert board.ratio(micro, both)[:3] == pytest.approx((4.3 / 3.4, 3.0 / 3.8, 4.7 / 3.1))
    board.note_pair(micro, both, Interval(1.12, 1.06, 1.2, 20))
    assert board.best("exact") is both and board.ratio(both, micro).value == pytest.approx(1 / 1.12)
    board.note_pair(micro, both, Interval(1.12, 0.98, 1.2, 20))
    assert board.best("exact") is micro, "noise"
    board.note_pair(micro, both, Interval(1.02, 1.01, 1.03, 40))
    assert board.best("exact") is micro, "next to nothing"


def test_equals_are_seldom_told_apart_however_often_they_are_looked_at() -> None:
    """Rounds that scatter by 10 %: of 40 pairs of equals one in ten may be, at a confidence of 90 %."""

    def told_apart(confidence: float) -> int:
        pairs = [np.exp(np.random.default_rng(seed).normal(0.0, 0.1, MOST_CLOSE_ROUNDS)) for seed in range(40)]
        ends = range(CLOSE_ROUNDS, MOST_CLOSE_ROUNDS + 1, CLOSE_ROUNDS)
        looks = [[median_interval(list(ratios[:end]), confidence) for end in ends] for ratios in pairs]
        return sum(any(one.low > 1.0 or one.high < 1.0 for one in seen) for seen in looks)

    assert told_apart(0.9) > 4 >= told_apart(confidence_of(0.9, CLOSE_ROUNDS))


def test_of_equal_numbers_the_one_nearer_to_the_users_wins() -> None:
    board = board_of(({MICRO: 16}, (3.9, 4.0, 4.1)), ({MICRO: 8}, (3.6, 3.7, 3.8)))
    _, large, small = board.entries.values()
    assert board.best("exact") is large
    board.note_pair(small, large, Interval(1.01, 0.97, 1.05, 20))
    assert board.best("exact") is small


def test_what_a_race_beats_does_not_win_by_a_third_that_is_as_good_as_both() -> None:
    """16 beats 4 beyond noise; 8 is told apart from neither."""
    wide = (2.3, 3.3, 4.6)
    board = board_of(({MICRO: 16}, wide), ({MICRO: 8}, wide), ({MICRO: 4}, wide))
    _, large, middle, small = board.entries.values()
    board.note_pair(small, large, Interval(1.24, 1.14, 1.34, 10))
    board.note_pair(middle, large, Interval(1.02, 0.94, 1.1, 10))
    assert board.best("exact") is middle
    board.note_pair(middle, large, Interval(1.06, 0.94, 1.1, 10))
    assert board.best("exact") is large, "of as many changes the one that seems better, nearer or not"


@pytest.mark.parametrize("rounds", range(FIRST_ROUNDS, CLOSE_ROUNDS + 1))
def test_fewer_rounds_than_a_verdict_needs_do_not_speak(rounds: int) -> None:
    """An interval of a median of few ends at the least and the most of them: all on one side would be a verdict."""
    confidence = confidence_of(0.95, rounds)
    fewest = fewest_rounds(confidence)
    assert 2.0 * 0.5**fewest <= 1.0 - confidence < 2.0 * 0.5 ** (fewest - 1)
    assert median_interval([1.05, 1.06, 1.07, 1.08, 1.09], confidence)[1:3] == (1.05, 1.09)
