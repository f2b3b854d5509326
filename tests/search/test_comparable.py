"""Steps that train on other shares of their completions: the line of their seconds, and one share for all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pytest

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.predict.objective import living_of
from grpo_autotune.records.probe import StageTimings
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.comparable import LivingRows
from grpo_autotune.search.evaluator import Evaluator, expected_share
from grpo_autotune.search.leaderboard import Leaderboard
from tests.search.test_session import Paper
from tests.search.test_workers import SLOWER
from tests.search.test_workers import Paper as PaperWithWorkers
from tests.support.paper_machine import record_of, seconds, user_config
from tests.support.sample_records import timings, token_facts

MICRO = "grpo.per_device_train_batch_size"
OWN = {MICRO: 2}


def outcome_of(
    shares: list[float], *, rest_s: float = 2.0, old_s: float = 0.5, none_s: float = 0.2, slope_s: float = 3.0
) -> TrialOutcome:
    """Steps of `rest_s` besides a first pass over all rows, and a training pass that costs the more the more rows live:
    two parts of three of it backward."""
    passes = [none_s + slope_s * share for share in shares]
    whole = timings({"generation": rest_s})
    spent = {
        "generation": [rest_s] * len(shares),
        "policy_logprob": [old_s + s / 3.0 for s in passes],
        "backward": [2.0 * s / 3.0 for s in passes],
    }
    parts = {"policy_logprob": {"old_policy": [old_s] * len(shares), "training_forward": [s / 3.0 for s in passes]}}
    rows = [
        row.model_copy(
            update={"per_step_s": spent.get(row.name, [0.0] * len(shares)), "parts": parts.get(row.name, {})}
        )
        for row in whole.stages
    ]
    step_s = [rest_s + old_s + s for s in passes]
    whole = StageTimings(steps=list(range(len(shares))), step_s=step_s, stages=rows)
    record = record_of(user_config()).model_copy(update={"timings": whole, "living_shares": shares})
    return TrialOutcome(number=1, status="ok", record=record, step_s=step_s, living_shares=shares)


def seen(rows: LivingRows, knobs: dict[str, Any], *outcomes: TrialOutcome) -> LivingRows:
    for outcome in outcomes:
        rows.learn(knobs, outcome)
    return rows


def stage(outcome: TrialOutcome, name: str) -> Any:
    assert outcome.record is not None
    return next(row for row in outcome.record.timings.stages if row.name == name)


def test_all_steps_are_brought_to_one_share_and_the_stages_with_them() -> None:
    outcome = outcome_of([0.0, 0.5, 1.0, 0.25], none_s=0.0)
    rows = seen(LivingRows(), OWN, outcome)
    assert rows.slope_s(OWN) == pytest.approx(3.0)
    even = rows.at(0.5, OWN, outcome)
    assert even.record is not None and even.record.living_share == 0.5
    assert even.step_s == pytest.approx([2.0 + 0.5 + 1.5] * 4)
    assert even.record.timings.step_s == even.step_s and outcome.step_s[2] == 5.5, "the measured one is as it was"
    policy = stage(even, "policy_logprob")
    assert stage(even, "backward").per_step_s == policy.per_step_s == pytest.approx([1.0] * 4)
    assert policy.parts == {"old_policy": [0.5] * 4, "training_forward": pytest.approx([0.5] * 4)}
    assert stage(even, "generation").per_step_s == [2.0] * 4


def test_rounds_of_several_steps_are_brought_to_it_by_their_mean_share() -> None:
    outcome = outcome_of([0.0, 0.5, 1.0, 0.5], none_s=0.0)
    rows = seen(LivingRows(), OWN, outcome)
    rounds = {"step_s": [mean(outcome.step_s[:2]), mean(outcome.step_s[2:])], "living_shares": [0.25, 0.75]}
    even = rows.at(0.5, OWN, outcome.model_copy(update=rounds))
    assert even.step_s == pytest.approx([4.0] * 2) and even.living_shares == [0.5] * 2
    assert even.record is not None and even.record.living_share == 0.5 and len(even.record.timings.step_s) == 4


def test_several_ranks_wait_for_the_one_with_most_rows() -> None:
    outcome = outcome_of([0.0, 1.0])
    assert outcome.record is not None
    trainer = outcome.record.trainer.model_copy(update={"world_size": 2})
    outcome = outcome.model_copy(update={"record": outcome.record.model_copy(update={"trainer": trainer})})
    rows = seen(LivingRows(), OWN, outcome)
    assert rows.slope_s(OWN) is None and rows.at(0.5, OWN, outcome) is outcome


def test_what_a_step_without_living_rows_takes_is_no_part_of_the_slope() -> None:
    outcomes = [outcome_of([share, 0.5, 0.0], none_s=0.4) for share in (0.0, 1.0, 0.5, 0.0, 1.0)]
    rows = seen(LivingRows(), OWN, *outcomes)
    assert rows.slope_s(OWN) == pytest.approx(3.0, rel=0.06)
    middles = [median(rows.at(0.3, OWN, outcome).step_s) for outcome in outcomes]
    assert middles == pytest.approx([2.0 + 0.5 + 0.4 + 0.9] * 5, rel=0.02)


def test_noise_makes_no_part_negative() -> None:
    rows = seen(LivingRows(), OWN, outcome_of([0.48, 0.52], slope_s=-3.0, none_s=4.0))
    assert 0.0 <= (rows.slope_s(OWN) or -1.0) <= 5.3, "the pass takes 2.5 s: no more than in proportion"


def test_a_combination_whose_steps_trained_on_nothing_is_known_by_the_nearest() -> None:
    near, far = {**OWN, MICRO: 4}, {**OWN, MICRO: 16, "grpo.gradient_checkpointing": False}
    rows, dead = LivingRows(), outcome_of([0.0, 0.0])
    rows.learn(OWN, dead)
    assert rows.slope_s(OWN) is None and rows.at(0.5, OWN, dead) is dead
    rows.learn(far, outcome_of([0.5, 1.0], slope_s=9.0, none_s=0.0))
    assert rows.slope_s(OWN) == pytest.approx(9.0)
    rows.learn(near, outcome_of([0.5, 1.0], slope_s=4.0, none_s=0.02))  # dead steps of ten times that are no pace
    assert rows.slope_s(OWN) == pytest.approx(4.0, rel=0.01)
    assert rows.at(0.5, OWN, dead).step_s == pytest.approx([2.0 + 0.5 + 0.2 + 2.0] * 2, rel=0.01)


def test_no_step_is_shorter_than_without_its_training_pass() -> None:
    rows, short, long = LivingRows(), outcome_of([1.0], rest_s=0.01, slope_s=1.0), outcome_of([1.0], slope_s=5.0)
    for outcome in (short, long):
        rows.learn(OWN, outcome)
    assert short.record is not None and long.record is not None
    (first,), (second,) = (
        zip(*(row.per_step_s for row in one.record.timings.stages), strict=True) for one in (short, long)
    )
    stages = [
        row.model_copy(update={"per_step_s": [a, b], "parts": {}})
        for row, a, b in zip(short.record.timings.stages, first, second, strict=True)
    ]
    timings_ = StageTimings(steps=[0, 1], step_s=[sum(first), sum(second)], stages=stages)
    record = short.record.model_copy(update={"timings": timings_, "living_shares": [1.0, 1.0]})
    both = short.model_copy(update={"record": record, "step_s": timings_.step_s, "living_shares": [1.0, 1.0]})
    assert min(rows.at(0.0, OWN, both).step_s) >= 0.0, "a slope of 3 s would leave less than nothing of 1.7 s"
    rounds = outcome_of([0.0], rest_s=0.01).model_copy(update={"step_s": [0.4, 6.0], "living_shares": [0.0, 1.0]})
    rows_of_rounds = seen(LivingRows(), OWN, outcome_of([1.0, 0.0], slope_s=5.0), rounds)
    dead, alive = rows_of_rounds.at(0.0, OWN, rounds).step_s
    assert dead == pytest.approx(0.4), "its last step trained on nothing"
    assert alive == pytest.approx(1.0, abs=0.3)


def test_without_the_speed_up_nothing_is_moved() -> None:
    outcome = outcome_of([])
    rows = seen(LivingRows(), OWN, outcome, TrialOutcome(number=2, status="crashed"))
    assert rows.slope_s(OWN) is None and rows.at(0.5, OWN, outcome) is outcome
    rows.learn({MICRO: 4}, outcome_of([1.0]))
    assert rows.slope_s(OWN) is None, "another's does not make it one that leaves rows out"


RATES = [0.0] * 16 + [count / 8 for count in (1, 2, 3, 4, 5, 2, 6, 3)] * 2
PROBED = token_facts(groups=len(RATES), dead_groups=16, pass_rates=RATES)


def living(paper: Paper, spec: TrialSpec, share: Callable[[], float]) -> TrialOutcome:
    """A measured trial whose steps leave rows out unless they are the user's: half of the seconds of a step that
    trains on all rows is generation, and the rest follows the share. Half of the probe's groups have a spread."""
    outcome, config = paper.trials._measured(spec), RunConfig.from_dict(spec.config)
    if outcome.record is None or not outcome.step_s:
        return outcome
    record = outcome.record.model_copy(update={"tokens": PROBED})
    if config.batch.micro_batch == 2:
        return outcome.model_copy(update={"record": record})
    half_s, shares = 0.5 * seconds(config), [share() for _ in outcome.step_s]
    made = outcome_of(shares, rest_s=half_s, old_s=0.0, none_s=0.02 * half_s, slope_s=half_s)
    assert made.record is not None
    record = record.model_copy(update={"timings": made.record.timings, "living_shares": shares})
    return outcome.model_copy(update={"record": record, "step_s": made.step_s, "living_shares": shares})


def searched(folder: Path, share: Callable[[], float]) -> tuple[SearchReport, Receipt]:
    paper = Paper(folder, act=lambda spec: living(paper, spec, share))
    report = paper.search(600.0)
    receipt = load_config(str(folder / "tuned.yaml")).receipt
    assert report.best.raced and MICRO in report.best.changed and receipt is not None
    return report, receipt


def winner(folder: Path) -> RunConfig:
    return load_config(str(folder / "tuned.yaml"))


def test_a_search_tells_the_seconds_of_the_share_that_the_rewards_let_expect(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    report, receipt = searched(tmp_path, lambda: float(random.choice([0.0, 0.5, 1.0])))
    half_s = 0.5 * seconds(winner(tmp_path))
    expected = living_of(record_of(user_config()).model_copy(update={"tokens": PROBED}))
    assert expected is not None and receipt.living_share == pytest.approx(expected.share(8))
    assert receipt.living_s == pytest.approx(half_s, rel=0.05)
    assert receipt.step_s == pytest.approx(half_s * (1.02 + receipt.living_share), rel=0.03)
    assert receipt.step_s_high - receipt.step_s_low < 0.1 * half_s, "which rows lived is no noise"
    assert report.best.speedup == pytest.approx(receipt.baseline_step_s / receipt.step_s, rel=0.05)
    (told,) = (note for note in report.notes if "skip_dead leaves out" in note)
    assert f"{receipt.living_share:.0%} of the completions" in told
    slowest_s = receipt.step_s + (1.0 - receipt.living_share) * receipt.living_s
    assert f"{slowest_s:.3g} s (x {receipt.baseline_step_s / slowest_s:.2f}) where all have one" in told


@pytest.mark.parametrize("dead", [4, 10])  # of the first trial, and of all before the race
def test_what_was_measured_before_any_step_trained_is_brought_to_the_share_later(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, drawn, searches = np.random.default_rng(4), list[int](), list[Evaluator]()
    learn = Evaluator.learn
    monkeypatch.setattr(Evaluator, "learn", lambda self, *trial: (searches.append(self), learn(self, *trial))[1])

    def share() -> float:
        drawn.append(1)
        return 0.0 if len(drawn) <= dead else float(random.choice([0.0, 0.5, 1.0]))

    searched(tmp_path, share)
    board = searches[-1].board
    first = min((e for e in board.entries.values() if e.knobs[MICRO] != 2), key=lambda entry: entry.number)
    stored = TrialOutcome.model_validate_json((tmp_path / f"trials/{first.number:04d}/outcome.json").read_text())
    assert stored.living_shares and not any(stored.living_shares), "it trained on nothing"
    expected = expected_share(board, first.config)
    assert expected is not None and first.living_share == pytest.approx(expected)
    moved_s = [even - raw for even, raw in zip(first.steps_s, stored.step_s, strict=False)]
    assert moved_s == pytest.approx([moved_s[0]] * len(moved_s)), "by the slope of the first that trained"
    assert moved_s[0] > 0.2 * 0.5 * seconds(first.config) * expected


def test_a_place_is_compared_at_one_share_with_the_whole_machine(tmp_path: Path) -> None:
    random = np.random.default_rng(2)

    def act(spec: TrialSpec) -> TrialOutcome:
        slower = SLOWER.get(spec.place or "", 1.0)
        outcome, half_s = paper.trials._measured(spec, slower), 0.5 * slower * seconds(RunConfig.from_dict(spec.config))
        if outcome.record is None:
            return outcome
        shares = [float(random.choice([0.0, 0.5, 1.0])) for _ in outcome.step_s]
        made = outcome_of(shares, rest_s=half_s, old_s=0.0, none_s=0.02 * half_s, slope_s=half_s)
        assert made.record is not None
        update = {"timings": made.record.timings, "living_shares": shares, "tokens": PROBED}
        record = outcome.record.model_copy(update=update)
        return outcome.model_copy(update={"record": record, "step_s": made.step_s, "living_shares": shares})

    paper = PaperWithWorkers(tmp_path, act=act)
    report = paper.search(400.0)
    for place, slower in SLOWER.items():
        told = re.search(rf"Worker on {place}: .* your configuration took x ([\d.]+) of", "\n".join(report.notes))
        assert told is not None and float(told[1]) == pytest.approx(slower, rel=0.06)
    assert report.best.raced and report.best.living_s == pytest.approx(0.5 * seconds(winner(tmp_path)), rel=0.06)


def test_completions_that_are_masked_are_no_part_of_the_share() -> None:
    own = user_config()
    masked = own.model_copy(update={"grpo": own.grpo | {"mask_truncated_completions": True}})
    record = record_of(masked)
    tokens = PROBED.model_copy(update={"truncated_share": 0.5})
    board = Leaderboard(masked, {}, record.model_copy(update={"tokens": tokens}))
    assert board.living is not None
    assert expected_share(board, masked) == pytest.approx(0.5 * board.living.share(8))
    assert expected_share(board, own) == pytest.approx(board.living.share(8))


def test_without_a_step_that_trained_the_share_is_told_and_nothing_made_up(tmp_path: Path) -> None:
    report, receipt = searched(tmp_path, lambda: 0.0)
    assert receipt.living_share == 0.0 and receipt.living_s is None
    assert any("trained on 0% of the completions while it was measured" in note for note in report.notes)


def test_a_search_that_goes_on_after_its_race_knows_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    first, receipt = searched(tmp_path, lambda: float(random.choice([0.0, 0.5, 1.0])))
    paper = Paper(tmp_path)
    paper.trials.act = lambda spec: living(paper, spec, lambda: 0.5)
    again = paper.search(600.0, resume=True)
    assert (again.best.living_share, again.best.step_s) == (first.best.living_share, first.best.step_s)
    assert again.best.living_s == pytest.approx(receipt.living_s)
