"""A search that tells the truth on paper machines that are noisy, drift, evaluate, or lend cores to others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.probe import OtherLoad, StageTimings
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.render.search import headline, render_search
from grpo_autotune.search.ablation import contribution, contributions, exact_share
from grpo_autotune.search.budget import Budget, Costs
from grpo_autotune.search.comparable import Pace
from grpo_autotune.search.evaluator import Evaluator, without_evaluations
from grpo_autotune.search.final_race import race_s, rounds_that_fit
from grpo_autotune.search.leaderboard import Leaderboard, RaceResult
from grpo_autotune.search.session import search
from grpo_autotune.search.start import occasions_s
from grpo_autotune.search.summary import _notes, candidate
from tests.support.paper_machine import MACHINE, Listener, PaperModels, PaperTrials, record_of, user_config
from tests.support.sample_records import timings

MICRO, CHECKPOINTING = "grpo.per_device_train_batch_size", "grpo.gradient_checkpointing"
WORKERS, GROUP, SIZE = "grpo.dataloader_num_workers", "grpo.num_generations", "data.image_size"


def config_of(grpo: dict[str, Any] | None = None, **axes: Any) -> RunConfig:
    """The user's configuration with these axes alone."""
    values = user_config().to_dict()
    values["grpo"] |= grpo or {}
    values["search"]["knobs"] = dict.fromkeys(values["search"]["knobs"]) | {
        {"micro": MICRO, "checkpointing": CHECKPOINTING, "workers": WORKERS, "group": GROUP, "size": SIZE}[name]: axis
        for name, axis in axes.items()
    }
    if (grpo or {}).get("eval_strategy"):
        values["data"]["eval_split"] = "test"
    return RunConfig.from_dict(values)


def searched(
    folder: Path, config: RunConfig, change: Callable[[TrialSpec, TrialOutcome], TrialOutcome], budget_s: float = 900.0,
    models: PaperModels | None = None, **trials: Any,
) -> tuple[SearchReport, PaperTrials]:  # fmt: skip
    """A search whose trials end as on the paper machine, but for `change`."""
    paper = PaperTrials(folder, act=lambda spec: change(spec, paper._measured(spec)), **trials)
    report = search(
        config, budget_s=budget_s, out=None, run_dir=folder, view=Listener(), runner=lambda _: paper,
        fit=lambda *probe: models or PaperModels(), clock=paper.clock, machine=MACHINE,
    )  # fmt: skip
    return report, paper


def slower(outcome: TrialOutcome, factor: float) -> TrialOutcome:
    return outcome.model_copy(update={"step_s": [factor * s for s in outcome.step_s]})


def knob(spec: TrialSpec, key: str) -> Any:
    return spec.config["grpo"].get(key.removeprefix("grpo."))


def board_of(*entries: tuple[dict[str, Any], list[float], dict[str, float]], **more: Any) -> Leaderboard:
    """A leaderboard of entries with their steps and stages, the first of them the user's."""
    config = config_of()
    board = Leaderboard(config, entries[0][0], record_of(config), **more)
    for number, (knobs, step_s, stages) in enumerate(entries):
        record = record_of(config).model_copy(update={"timings": timings(stages)})
        board.add(knobs, TrialOutcome(number=number, status="ok", record=record, step_s=step_s), None)
    return board


class Sure(PaperModels):
    """Leave nothing to try that is predicted to be slower than the best."""

    def step_s(self, config: RunConfig) -> Interval:
        value = super().step_s(config).value
        return Interval(value, 0.99 * value, 1.01 * value)

    def learn(self, config: RunConfig, outcome: TrialOutcome) -> PaperModels:
        return self


# Noise


def test_what_lucky_trials_show_beyond_what_the_stage_takes_is_noise(tmp_path: Path) -> None:
    """Loading takes 4 % of a step, and every trial with a loader worker happens to be 12 % faster."""

    def lucky(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        assert outcome.record is not None
        stages = {"data": 0.04, "generation": 0.48, "backward": 0.48}
        record = outcome.record.model_copy(update={"timings": timings(stages)})
        return slower(outcome.model_copy(update={"record": record}), 0.88 if knob(spec, WORKERS) else 1.0)

    report, _ = searched(tmp_path, config_of(micro=[2, 8], workers=[0, 1]), lucky)
    factors = {row.key: row.factor for row in report.contributions}
    assert factors == {MICRO: pytest.approx(2.0, rel=0.05)} and report.best.changed == {MICRO: 8}


def test_changes_of_stages_that_take_no_time_are_not_tried(tmp_path: Path) -> None:
    report, paper = searched(tmp_path, config_of(micro=[2, 8, 16], workers=[0, 1, 2]), lambda spec, outcome: outcome)
    assert report.best.changed == {MICRO: 16} and not any(knob(spec, WORKERS) for spec in paper.specs)
    assert any(row.count == 6 and "take next to no time" in row.why for row in report.skipped)


def test_no_ratio_exceeds_amdahls_bound() -> None:
    stages = {"data": 0.01, "generation": 0.5, "backward": 0.5}
    board = board_of(({WORKERS: 0, CHECKPOINTING: True}, [1.01] * 3, stages))
    board = board_of(
        ({WORKERS: 0, CHECKPOINTING: True}, [1.01] * 3, stages),
        ({WORKERS: 1, CHECKPOINTING: True}, [0.9] * 3, {**stages, "data": 0.001}),
        ({WORKERS: 1, CHECKPOINTING: False}, [0.5] * 3, {**stages, "data": 0.001}),
    )
    own, workers, both = board.entries.values()
    assert board.speedup(workers).value == 1.0 and board.speedup(workers).low <= 1.0
    assert board.ratio(workers, both).value == pytest.approx(1.8), "checkpointing reaches all stages"
    assert board.ratio(own, both).value == pytest.approx(2.02)
    assert board.best("exact") is both
    assert math.isinf(board.most([WORKERS], workers, own)), "fewer workers may free cores for the rest"


def test_a_ratio_a_little_beyond_its_bound_is_the_bound_and_far_beyond_it_noise() -> None:
    """Loading takes half of a step, so that x 2 is possible; then 4 % of it."""
    stages = {"data": 1.0, "generation": 1.0}
    board = board_of(({WORKERS: 0}, [2.0] * 3, stages), ({WORKERS: 1}, [1.0] * 3, stages))
    own, workers = board.entries.values()
    assert board.bounded(Interval(1.9, 1.8, 2.1, 5), own, workers)[:3] == pytest.approx((1.9, 1.8, 2.0))
    value, low, high, _ = board.bounded(Interval(2.05, 2.02, 2.1, 5), own, workers)
    assert (value, low) == pytest.approx((2.0 / 1.01, 2.0 / 1.01**2)) and high >= 2.0
    few = [replace(entry, stages_s={"data": 0.04, "generation": 0.96}) for entry in (own, workers)]
    value, low, high, _ = board.bounded(Interval(1.14, 1.12, 1.16, 5), few[0], few[1])
    assert value == 1.0 and low < 1.0 < high


def test_a_change_that_only_the_models_believe_in_is_left_out_and_what_is_left_is_tested(tmp_path: Path) -> None:
    """Checkpointing off is predicted to bring x 1.25 and brings nothing."""

    def useless(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        return slower(outcome, 1.25 if knob(spec, CHECKPOINTING) is False else 1.0)

    axes = {"micro": [2, 8], "checkpointing": [True, False]}
    report, paper = searched(tmp_path, config_of(**axes), useless, models=Sure())
    assert report.best.changed == report.best_exact.changed == {MICRO: 8}
    assert report.best.raced and report.best.worst_case == "passed"
    tested = [spec for spec in paper.specs if spec.source == "race" or spec.purpose == "worst_case"]
    # side by side, and then what is left alone
    assert [knob(spec, CHECKPOINTING) for spec in tested if knob(spec, MICRO) == 8] == [False, True, True, True]


def test_contributions_and_the_rest_make_up_the_measured_gain(tmp_path: Path) -> None:
    """In the race the winner gains half of what was predicted, and there is no time to take its changes back."""

    def disappointing(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        changed = knob(spec, MICRO) != 2 or knob(spec, CHECKPOINTING) is False
        if spec.source == "revert":
            return TrialOutcome(number=spec.number, status="crashed", why="no", elapsed_s=1.0)
        return slower(outcome, 1.5 if changed else 1.0)

    report, _ = searched(tmp_path, config_of(micro=[2, 8], checkpointing=[True, False], workers=[0, 1]), disappointing)
    factors = [row.factor for row in report.contributions]
    assert len(factors) > 1 and None not in factors
    assert math.prod(f or 0.0 for f in factors) * report.together == pytest.approx(report.best.speedup)
    assert report.together == pytest.approx(1.0) and min(f or 0.0 for f in factors) >= 1.0
    assert all(not row.measured or row.low is not None for row in report.contributions)


def test_measured_contributions_never_multiply_to_more_than_the_gain() -> None:
    """Each change brings x 3 where the other is there, both bring x 4."""
    stages = {"generation": 1.0}
    pairs = [(True, 512, 4.0), (False, 512, 3.0), (True, 256, 3.0), (False, 256, 1.0)]
    board = board_of(*(({CHECKPOINTING: c, SIZE: s}, [step_s] * 3, stages) for c, s, step_s in pairs))
    evaluator = cast(Evaluator, SimpleNamespace(board=board, models=PaperModels(), machine=MACHINE))
    winner = list(board.entries.values())[-1]
    rows = contributions(evaluator, winner)
    assert [row.factor for row in rows] == pytest.approx([2.0, 2.0]) and all(row.measured for row in rows)
    assert contribution(evaluator, winner, SIZE).factor == pytest.approx(3.0)
    assert exact_share(evaluator, winner, rows) == pytest.approx(0.5)


# Race


@pytest.mark.parametrize(("budget_s", "startup_s", "step"), [(100.0, 4.0, 1.0), (420.0, 15.0, 8.0)])
def test_time_for_worst_case_and_race_is_kept_and_grows_with_the_step(
    tmp_path: Path, budget_s: float, startup_s: float, step: float
) -> None:
    def slow(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        return slower(outcome, step).model_copy(update={"elapsed_s": startup_s + sum(outcome.step_s) * step * 4 / 3})

    report, paper = searched(
        tmp_path, config_of(micro=[2, 4, 8], checkpointing=[True, False]), slow, budget_s, startup_s=startup_s
    )
    assert paper.now <= budget_s
    assert report.best.changed and report.best.raced and report.best.worst_case == "passed"
    assert headline(report)[0].startswith("Search: ")


def test_the_budget_keeps_what_the_end_needs() -> None:
    budget = Budget(100.0, clock=lambda: 0.0)
    for needed_s, kept_s in (((5.0,), 20.0), ((35.0,), 35.0), ((55.0,), 55.0), ((90.0,), 20.0), ((90.0, 40.0), 40.0)):
        budget.keep(*needed_s)
        assert budget.end_s == kept_s


def test_a_winner_without_a_race_is_said_first(tmp_path: Path) -> None:
    def no_race(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        late = TrialOutcome(number=spec.number, status="timeout", elapsed_s=1.0)
        return late if spec.source == "race" else outcome

    report, _ = searched(tmp_path, config_of(micro=[2, 8]), no_race, 120.0)
    assert report.best.changed and not report.best.raced
    for ended, why in {"budget": "no time was left for it", "interrupted": "the search was stopped before"}.items():
        told = headline(report.model_copy(update={"ended": ended}))[0]
        assert told.startswith(f"The winner was not raced against your configuration: {why}. Search: ")


# Drift


def test_the_pace_is_a_line_between_measurements_and_doubted_by_half_of_a_change() -> None:
    pace = Pace()
    assert pace.at(3) == 1.0 and pace.doubt == 1.0
    for number, value in ((0, 1.0), (6, 1.21), (10, 1.21)):
        pace.learn(number, Interval(value, value - 0.01, value + 0.01, 3))
    assert [pace.at(n) for n in (0, 3, 6, 8, 20)] == pytest.approx([1.0, 1.1, 1.21, 1.21, 1.21])
    assert pace.doubt == pytest.approx(1.1)
    pace.learn(12, Interval(0.81, 0.7, 1.3, 3))
    assert pace.at(12) == 1.0, "the steps' own scatter"
    assert pace.doubt == pytest.approx((1.21 / 0.81) ** 0.5)


def test_a_drift_is_taken_out_of_what_trials_tell(tmp_path: Path) -> None:
    """Everything takes twice as long in the end."""
    config = config_of(micro=[2, 4, 8, 16], checkpointing=[True, False], size=[512, 256])
    report, _ = searched(tmp_path, config, lambda spec, outcome: outcome, 600.0, drift=1.0 / 600.0)
    again = [row for row in report.trials if row.source == "again"]
    assert again and not any(row.knobs != report.baseline.knobs for row in again)
    assert report.baseline.step_s == pytest.approx(1.2, rel=0.1), "the first time counts"
    assert any("Your configuration was measured" in note for note in report.notes)
    measured = {row.key: row.factor for row in report.contributions if row.measured}
    assert measured.get(CHECKPOINTING, 1.25) == pytest.approx(1.25, rel=0.1)
    for row in report.pareto:
        if row.changed == {CHECKPOINTING: False}:
            assert row.speedup == pytest.approx(1.25, rel=0.1)


# Group size


def test_more_completions_of_fewer_prompts_stay_unproven(tmp_path: Path) -> None:
    """16 completions per step: groups of 16 are one prompt, whatever they bring."""
    report, _ = searched(tmp_path, config_of(group=[8, 16]), lambda spec, outcome: outcome)
    guard = next(guard for guard in report.guards if guard.key == GROUP)
    assert not guard.proven
    told = re.search(r"fewer prompts: ([\d.]+) groups with any spread of rewards per step, before ([\d.]+)", guard.why)
    assert told is not None and float(told[1]) < float(told[2]), "with the digits that tell them apart"
    assert report.best.changed == {} and report.best_fast.changed == {GROUP: 16}


def test_groups_that_the_user_accepts_or_that_become_more_are_not_held_back() -> None:
    board = board_of(({GROUP: 8}, [1.0] * 3, {"generation": 1.0}))
    assert board.loses_groups({GROUP: 16}) and not board.allows({GROUP: 16}, "open")
    assert not board.loses_groups({GROUP: 4}) and board.allows({GROUP: 4}, "open")
    accepted = user_config(accept=[GROUP])
    assert not Leaderboard(accepted, {GROUP: 8}, record_of(accepted)).loses_groups({GROUP: 16})


def test_a_race_that_a_busy_machine_disturbed_is_told_with_what_it_showed() -> None:
    own, rival = {"generation": 8.0}, {"generation": 4.0}
    board = board_of(({CHECKPOINTING: True}, [8.0] * 3, own), ({CHECKPOINTING: False}, [4.0] * 3, rival))
    entry = list(board.entries.values())[1]
    disturbed = RaceResult(Interval(3.8, 0.7, 5.5, 5), Interval(6.2, 5.8, 18.5), Interval(24.0, 11.2, 33.8))
    board.update(entry, race=disturbed)
    (told,) = (note for note in _notes(board, candidate(board, entry)) if "raced" in note)
    assert "Trial 1 was raced at x 3.80 (0.70 to 5.50), which may be noise" in told
    assert "took x 3.00 of its first time" in told
    board.update(entry, race=RaceResult(Interval(2.0, 1.9, 2.1, 5), Interval(4.0, 3.9, 4.1), Interval(8.0, 7.9, 8.1)))
    assert not any("raced" in note for note in _notes(board, candidate(board, entry)))


# Evaluation

EVALUATING = {"eval_strategy": "steps", "eval_steps": 5}


def with_evaluation(plain: StageTimings, seconds: float) -> StageTimings:
    """The second step evaluates for so long."""
    spent = [0.0, seconds, 0.0]
    rows = [
        row.model_copy(update={"per_step_s": spent, "parts": {"evaluate": spent}})
        if row.name == "log_save_eval"
        else row
        for row in plain.stages
    ]
    step_s = [a + b for a, b in zip(plain.step_s, spent, strict=True)]
    return plain.model_copy(update={"step_s": step_s, "stages": rows})


def test_evaluations_are_taken_out_of_steps_and_counted_by_their_interval() -> None:
    plain = timings({"generation": 1.0})
    seen = with_evaluation(plain, 6.0)
    record = record_of(user_config()).model_copy(update={"timings": seen})
    outcome = without_evaluations(TrialOutcome(number=1, status="ok", record=record, step_s=seen.step_s))
    assert outcome.step_s == pytest.approx(plain.step_s)
    assert outcome.record is not None and outcome.record.timings.step_s == pytest.approx(plain.step_s)
    assert occasions_s(config_of(EVALUATING), record)[0] == pytest.approx(1.2)
    assert occasions_s(config_of({"eval_strategy": "steps", "logging_steps": 3}), record)[0] == pytest.approx(2.0)
    assert occasions_s(config_of({"eval_strategy": "epoch"}), record)[0] == 0.0


def test_what_no_step_held_is_counted_as_it_was_measured_apart() -> None:
    record = record_of(user_config()).model_copy(update={"occasions": {"evaluate": 6.0, "save": 4.0}})
    assert occasions_s(config_of({**EVALUATING, "save_steps": 8}), record) == pytest.approx((1.2, 0.5))
    assert occasions_s(config_of({"save_steps": 8, "save_strategy": "epoch"}), record) == (0.0, 0.0)
    assert occasions_s(config_of({}), record.model_copy(update={"occasions": {}})) == (0.0, 0.0)
    fast = {"generation": 0.25, "backward": 0.1}
    board = board_of(
        ({CHECKPOINTING: True}, [1.0] * 3, {"generation": 0.5, "backward": 0.5}),
        ({CHECKPOINTING: False}, [0.35] * 3, fast),
        evaluation_s=1.0,
        saving_s=0.5,
    )
    own, rival = board.entries.values()
    assert rival.aside_s - 0.5 == pytest.approx((own.aside_s - 0.5) / 2.0)


def test_what_makes_only_steps_faster_is_worth_less_where_evaluations_take_half_of_the_run() -> None:
    fast = {"generation": 0.5, "backward": 0.1}
    board = board_of(
        ({CHECKPOINTING: True}, [1.0] * 3, {"generation": 0.5, "backward": 0.5}),
        ({CHECKPOINTING: False}, [0.6] * 3, fast),
        evaluation_s=1.0,
    )
    own, rival = board.entries.values()
    assert own.aside_s == pytest.approx(rival.aside_s)
    expected = (1.0 + own.aside_s) / (0.6 + rival.aside_s)
    assert board.speedup(rival).value == pytest.approx(expected, rel=1e-3) and expected < 1.4


def test_noise_of_generation_is_noise_of_the_evaluations_that_follow_it() -> None:
    """A change that leaves generation alone, in a trial that generated faster at two of three steps."""
    stages = {"generation": 0.6, "backward": 0.4}
    board = board_of(({CHECKPOINTING: True}, [1.0, 1.0, 1.0], stages), evaluation_s=1.0)
    plain = timings(stages)
    lucky = [0.5 / 0.9 * s if n else 1.3 * s for n, s in enumerate([0.54, 0.6, 0.66])]
    rows = [row.model_copy(update={"per_step_s": lucky}) if row.name == "generation" else row for row in plain.stages]
    record = record_of(config_of()).model_copy(update={"timings": plain.model_copy(update={"stages": rows})})
    outcome = TrialOutcome(number=1, status="ok", record=record, step_s=[g + 0.4 for g in lucky])
    entry = board.add({CHECKPOINTING: False}, outcome, None)
    assert board.speedup(entry).low < 1.0 < board.speedup(entry).value


def test_a_search_counts_evaluations_runs_none_in_its_trials_and_offers_fewer_in_words(tmp_path: Path) -> None:
    def evaluating(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        if spec.purpose != "probe" or outcome.record is None:
            return outcome
        seen = with_evaluation(timings({"generation": 0.6, "backward": 0.6}), 6.0)
        return outcome.model_copy(
            update={"record": outcome.record.model_copy(update={"timings": seen}), "step_s": seen.step_s}
        )

    config = config_of(EVALUATING, micro=[2, 8])
    report, paper = searched(tmp_path, config, evaluating, lengths=[[3, 4]])
    assert [spec.config["grpo"]["eval_strategy"] for spec in paper.specs][:1] == ["steps"]
    assert {spec.config["grpo"]["eval_strategy"] for spec in paper.specs[1:]} == {"no"}
    assert report.evaluation_s == pytest.approx(1.2) and report.baseline.step_s == pytest.approx(1.2)
    assert report.best.knobs[MICRO] == 8 and report.best.speedup == pytest.approx(2.0, rel=0.1)
    told = "\n".join(report.notes)
    assert "Evaluations take 50% of your run" in told and "grpo.eval_steps 5 -> 10" in told
    assert "x 1.33" in told and "eval_steps" not in report.best.changed
    assert RunConfig.from_yaml((tmp_path / "tuned.yaml").read_text()).grpo["eval_steps"] == 5
    assert "evaluations apart" in "\n".join(headline(report))


# Others


@pytest.mark.parametrize("matters", [True, False])
def test_what_others_took_stands_in_the_report(tmp_path: Path, matters: bool) -> None:
    def shared(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
        others = OtherLoad(cores=9.0 if spec.source == "race" else 1.25, of=4, matters=matters)
        assert outcome.record is not None
        return outcome.model_copy(update={"record": outcome.record.model_copy(update={"others": others})})

    report, _ = searched(tmp_path, config_of(micro=[2, 8]), shared, 200.0)
    assert report.others is not None and report.others.cores == 1.25, "in a race two of ours take turns"
    warned = any(line.startswith("Warning: other processes took 1.25 of 4 cores") for line in headline(report))
    assert warned is matters
    assert "meanwhile other processes took 1.25 of 4 cores" in render_search(report)


@pytest.mark.parametrize(
    ("engine", "seconds", "fit"),
    [(False, 1.5 * 60 + 1.2 * 3 * 5, 81), (True, (3 + 1) * 60 + 1.2 * 2 * 3 * 5, 7)],
)
def test_a_race_with_an_engine_counts_a_start_for_each_round(engine: bool, seconds: float, fit: int) -> None:
    """A cold start of 60 s, steps of 3 s and 2 s: side by side both start once, engines at each change of sides."""
    entries = [
        SimpleNamespace(step=Interval(s, s, s), config=SimpleNamespace(use_vllm=engine), cycle=1) for s in (3, 2)
    ]
    costs = Costs()
    costs._cold = [60.0]
    evaluator = SimpleNamespace(
        costs=costs, log=SimpleNamespace(has_pair=False), board=SimpleNamespace(baseline=entries[0])
    )
    assert race_s(cast(Evaluator, evaluator), cast(Any, entries[1])) == pytest.approx(seconds)
    assert rounds_that_fit(cast(Evaluator, evaluator), cast(Any, entries[1]), 576.0) == fit
