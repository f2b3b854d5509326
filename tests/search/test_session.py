"""A whole search on a machine on paper: what it measures, in which order, and what is left when it is cut short."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError, DataError, EnvironmentProblem, NothingSucceeded
from grpo_autotune.hardware import Gpu
from grpo_autotune.knobs import TABLE, engine_knobs
from grpo_autotune.predict.objective import Interval
from grpo_autotune.predict.room import LEAST_CHANCE, chance_to_fit
from grpo_autotune.records.probe import OtherLoad
from grpo_autotune.records.search import Guard, SearchReport
from grpo_autotune.records.trial import PromptReward, TrialOutcome, TrialSpec
from grpo_autotune.search.acquisition import rank
from grpo_autotune.search.budget import Budget, Costs, parse_budget
from grpo_autotune.search.evaluator import ENGINE_S, Evaluator, completion_lengths, patience_s
from grpo_autotune.search.folder import SearchFolder
from grpo_autotune.search.guard_trials import RewardTrials
from grpo_autotune.search.leaderboard import Leaderboard
from grpo_autotune.search.noninferiority import NO_TIME
from grpo_autotune.search.session import fingerprint_of, search
from tests.support.paper_machine import GIB, MACHINE, Listener, PaperModels, PaperTrials, record_of, user_config
from tests.support.sample_records import demo_record, spread, token_facts


class Paper:
    """Searches in one folder with one kind of trials."""

    def __init__(self, folder: Path, config: RunConfig | None = None, **trials: Any) -> None:
        self.folder, self.config = folder, config or user_config()
        self.trials = PaperTrials(folder, **trials)
        self.view = Listener()
        self.error = 1.1

    def search(self, budget_s: float = 300.0, models: PaperModels | None = None, **more: Any) -> SearchReport:
        models = models or PaperModels(self.error)
        return search(
            self.config,
            budget_s=budget_s,
            out=more.pop("out", None),
            run_dir=self.folder,
            view=self.view,
            runner=lambda folder: self.trials,
            fit=lambda *probe: models,
            clock=self.trials.clock,
            **{"machine": MACHINE, **more},
        )

    def tuned(self, which: str = "tuned") -> RunConfig:
        return load_config(SearchFolder(self.folder).tuned(which))

    def timed(self) -> list[TrialSpec]:
        return [spec for spec in self.trials.specs if spec.purpose == "timed" and spec.source != "race"]


def outcome_of(step_s: list[float]) -> TrialOutcome:
    return TrialOutcome(number=0, status="ok", record=record_of(user_config()), step_s=step_s)


def test_a_slow_configuration_becomes_the_best_that_fits(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    report = paper.search(out=tmp_path / "out.yaml")
    assert report.best.changed["grpo.per_device_train_batch_size"] in (8, 16)
    assert report.best.changed["data.image_size"] == 256
    assert report.best.raced and report.best.ci[0] > 1.0 and report.best.worst_case == "passed"
    assert report.best.speedup == pytest.approx(report.baseline.step_s / report.best.step_s, rel=0.05)
    assert report.best_exact.changed.keys() <= {"grpo.per_device_train_batch_size", "grpo.gradient_checkpointing"}
    assert paper.timed()[0].knobs["grpo.per_device_train_batch_size"] == 2
    assert paper.trials.closed
    assert (tmp_path / "out.yaml").read_text() == (tmp_path / "tuned.yaml").read_text()
    stored = SearchReport.model_validate_json((tmp_path / "search.json").read_text())
    assert stored == report
    assert {"schema", "baseline", "best", "best_exact", "trials", "model_error", "budget_s", "elapsed_s"} <= set(
        json.loads((tmp_path / "search.json").read_text())
    )


def test_the_probe_is_the_users_trial_where_others_can_repeat_its_lengths(tmp_path: Path) -> None:
    paper = Paper(tmp_path, lengths=[[3, 4], [5, 6]])
    report = paper.search()
    own = RunConfig.from_dict(paper.trials.specs[0].config)
    before_the_race = [spec for spec in paper.trials.specs[1:] if spec.source not in ("race", "again")]
    assert all(RunConfig.from_dict(spec.config) != own for spec in before_the_race if spec.purpose == "timed")
    assert report.baseline.number == paper.trials.specs[0].number and report.baseline.step_s > 0.0
    timed = [spec for spec in paper.trials.specs if spec.purpose == "timed"]
    assert timed and all(spec.seen_lengths == [[3, 4], [5, 6]] for spec in timed)
    assert report.best.raced and report.best.ci[0] > 1.0


def test_a_killed_search_whose_probe_was_the_users_trial_goes_on(tmp_path: Path) -> None:
    def killed(spec: TrialSpec) -> TrialOutcome | None:
        if len(paper.trials.specs) == 4:
            raise SystemError("kill -9")
        return None

    paper = Paper(tmp_path, lengths=[[3, 4]], act=killed)
    with pytest.raises(SystemError):
        paper.search()
    done = [spec.number for spec in paper.trials.specs[:-1]]
    paper.trials = PaperTrials(tmp_path)
    report = paper.search(resume=True)
    assert report.baseline.number == 0 and {row.number for row in report.trials} >= set(done)
    assert all(spec.seen_lengths == [[3, 4]] for spec in paper.timed())
    assert not any(spec.purpose == "probe" for spec in paper.trials.specs)


def test_a_search_that_was_killed_near_its_end_still_closes(tmp_path: Path) -> None:
    def killed(spec: TrialSpec) -> TrialOutcome | None:
        if spec.source == "race":
            raise SystemError("kill -9")
        return None

    paper = Paper(tmp_path, lengths=[[3, 4]], act=killed)
    with pytest.raises(SystemError):
        paper.search()
    state = SearchFolder(tmp_path).state_file
    state.write_text(json.dumps(json.loads(state.read_text()) | {"elapsed_s": 297.0}))
    paper.trials = PaperTrials(tmp_path)
    report = paper.search(resume=True)
    assert report.best.speedup > 1.0


def test_what_was_raced_before_a_kill_is_not_raced_again(tmp_path: Path) -> None:
    paper = Paper(tmp_path, lengths=[[3, 4]])
    before, folder = paper.search(), SearchFolder(tmp_path)
    state = json.loads(folder.state_file.read_text())
    folder.state_file.write_text(json.dumps(state | {"elapsed_s": 297.0, "finished": False}))
    with folder.races_file.open("a") as file:
        file.write('{"before": {"gr')
    paper.trials = PaperTrials(tmp_path)
    report = paper.search(resume=True)
    assert report.best.raced and (report.best.knobs, report.best.ci) == (before.best.knobs, before.best.ci)
    assert not any(spec.source == "race" for spec in paper.trials.specs)


def test_a_race_that_was_not_over_at_a_kill_is_run_again(tmp_path: Path) -> None:
    paper = Paper(tmp_path, lengths=[[3, 4]])
    before, folder = paper.search(), SearchFolder(tmp_path)
    assert before.best.ci[0] > 1.0
    rows = [row.model_copy(update={"speedup": (1.1, 0.99, 1.3, 5)}) for row in folder.races()]
    folder.races_file.unlink()
    for row in rows:
        folder.keep_race(row)
    paper.trials = PaperTrials(tmp_path)
    report = paper.search(600.0, resume=True)
    assert report.best.raced and report.best.ci[0] > 1.0
    assert any(spec.source == "race" for spec in paper.trials.specs)


def test_a_worst_case_that_did_not_fit_is_run_with_a_larger_budget(tmp_path: Path) -> None:
    paper = Paper(tmp_path, lengths=[[3, 4]])
    before = paper.search()
    number = next(row.number for row in before.trials if row.purpose == "worst_case")
    file = next((tmp_path / "trials").glob(f"*{number}")) / "outcome.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "timeout"}))
    paper.trials = PaperTrials(tmp_path)
    report = paper.search(600.0, resume=True)
    assert report.best.knobs == before.best.knobs and report.best.worst_case == "passed"
    assert any(spec.purpose == "worst_case" for spec in paper.trials.specs)
    assert not any(spec.source == "race" and spec.knobs == before.best.knobs for spec in paper.trials.specs)


def test_what_failed_in_a_race_before_a_kill_does_not_win_after_it(tmp_path: Path) -> None:
    paper = Paper(tmp_path, lengths=[[3, 4]])
    before, folder = paper.search(), SearchFolder(tmp_path)
    folder.keep_race(folder.races()[-1].model_copy(update={"rival": before.best.knobs, "fails": "failed in the race"}))
    paper.trials = PaperTrials(tmp_path)
    assert paper.search(600.0, resume=True).best.knobs != before.best.knobs


@pytest.mark.parametrize(
    ("ranks", "steps", "probe"), [(1, 3, (6, 3, 15.0)), (1, 10, (10, 10, 15.0)), (2, 3, (4, None, None))]
)
def test_a_slow_probe_ends_after_a_trials_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, steps: int, probe: tuple[Any, ...]
) -> None:
    """One of several ranks cannot decide that alone."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    paper = Paper(tmp_path, user_config(steps=steps))
    paper.search()
    spec = paper.trials.specs[0]
    assert (spec.steps, spec.least_steps, spec.enough_s) == probe


def test_entries_are_compared_over_the_steps_that_both_have() -> None:
    """Lengths differ from step to step, so a median over more of them is one of other work."""
    board = Leaderboard(user_config(), {"grpo.per_device_train_batch_size": 2}, record_of(user_config()))
    board.add(board.baseline_knobs, outcome_of([1.0, 2.0, 3.0, 9.0, 9.0, 9.0]), None)
    rival = board.add({"grpo.per_device_train_batch_size": 4}, outcome_of([1.0, 2.0, 3.0]), None)
    assert board.speedup(rival).value == pytest.approx(1.0)


@pytest.mark.parametrize("accept", [[], ["data.image_size"]])
def test_the_first_rival_is_the_best_that_needs_no_proof_and_not_the_least_known(
    tmp_path: Path, accept: list[str]
) -> None:
    class Doubtful(PaperModels):
        def step_s(self, config: RunConfig) -> Interval:
            value, unsure = super().step_s(config).value, config.batch.micro_batch == 4
            return Interval(value, value / (1e4 if unsure else 1.1), value * (1e4 if unsure else 1.1))

        def learn(self, config: RunConfig, outcome: TrialOutcome) -> PaperModels:
            return self

    paper = Paper(tmp_path, user_config(accept=accept))
    paper.search(budget_s=150.0, models=Doubtful())
    assert paper.timed()[1].knobs == {
        "data.image_size": 256 if accept else 512,
        "grpo.num_generations": 8,
        "grpo.per_device_train_batch_size": 8,  # 16 does not fit
        "grpo.gradient_checkpointing": False,
    }


def test_the_first_rival_has_no_change_that_is_predicted_to_bring_next_to_nothing(tmp_path: Path) -> None:
    class Exact(PaperModels):
        """Micro batches of 8 take half of the time, and without checkpointing a step takes 1 % less."""

        def step_s(self, config: RunConfig) -> Interval:
            plain = 0.99 if config.grpo["gradient_checkpointing"] is False else 1.0
            value = plain * (0.5 if config.batch.micro_batch >= 8 else 1.0)
            return Interval(value, value / 1.1, value * 1.1)

        def learn(self, config: RunConfig, outcome: TrialOutcome) -> PaperModels:
            return self

    paper = Paper(tmp_path)
    paper.search(budget_s=150.0, models=Exact())
    first = paper.timed()[1].knobs
    assert first["grpo.per_device_train_batch_size"] >= 8 and first["grpo.gradient_checkpointing"] is True
    assert sum(first[key] != value for key, value in paper.timed()[0].knobs.items()) == 1


def test_what_cannot_fit_or_win_never_runs(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    report = paper.search()
    assert not [row for row in report.trials if row.status == "oom"]
    assert any("memory" in row.why and row.count > 0 for row in report.skipped)
    names = [json.dumps(spec.knobs, sort_keys=True) for spec in paper.timed() if spec.source != "again"]
    assert len(names) == len(set(names))


def test_what_may_not_fit_is_worth_less_until_the_models_are_sure() -> None:
    class Unsure(PaperModels):
        def __init__(self, spread: float) -> None:
            super().__init__()
            self.spread = spread

        def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Interval:
            return Interval(8.0 * GIB, 8.0 * GIB / self.spread, 8.0 * GIB * self.spread)

    config, limit = user_config(), 9 * GIB
    chances = [chance_to_fit(Unsure(spread), config, limit) for spread in (1.01, 1.1, 1.5, 3.0)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.99 and 0.5 < chances[-1] < LEAST_CHANCE
    assert chance_to_fit(Unsure(1.1), config, 8 * GIB) < 0.5, "95 % of the memory is less than what is predicted"
    assert chance_to_fit(Unsure(3.0), config, None) == 1.0


def test_a_limit_on_the_process_counts_as_the_machines_memory(tmp_path: Path) -> None:
    paper = Paper(tmp_path, most_bytes=5 * GIB)  # micro batch 4 without checkpointing is too much, 4 with it is not
    report = paper.search()
    assert report.memory_limit_bytes == 5 * GIB
    assert not [row for row in report.trials if row.status == "oom"]
    assert any("memory" in row.why for row in report.skipped)
    assert report.best.speedup > 1.0


def test_the_lowest_limit_of_all_trials_counts(tmp_path: Path) -> None:
    ran_out: list[int] = []

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if ran_out or spec.purpose != "timed" or spec.knobs["grpo.per_device_train_batch_size"] == 2:
            return None
        ran_out.append(spec.number)
        return TrialOutcome(number=spec.number, status="oom", most_bytes=9 * GIB, elapsed_s=4.0)

    report = Paper(tmp_path, most_bytes=12 * GIB, act=act).search()
    assert report.memory_limit_bytes == 9 * GIB
    assert [row.number for row in report.trials if row.status == "oom"] == ran_out
    assert not [row for row in report.trials if (row.peak_bytes or 0) > 9 * GIB]


def test_the_tuned_files_load_and_say_what_was_measured(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    report = paper.search()
    tuned, exact = paper.tuned(), paper.tuned("exact")
    assert tuned.receipt is not None and exact.receipt is not None
    assert tuned.receipt.speedup == report.best.speedup and tuned.receipt.step_s == report.best.step_s
    assert tuned.receipt.machine == "paper" and tuned.receipt.versions == {"trl": "1.16"}
    assert {knob.key for knob in tuned.receipt.changed} == set(report.best.changed)
    assert exact.data.image_size == 512 and exact.batch.num_generations == 8
    assert tuned.batch.completions_per_step == exact.batch.completions_per_step == 16
    assert tuned.output.name == "paper-tuned"
    assert RunConfig.from_yaml(tuned.to_yaml()) == tuned


def test_a_size_that_costs_reward_stays_out_of_the_tuned_file(tmp_path: Path) -> None:
    paper = Paper(tmp_path, rewards={512: 0.5, 256: 0.3})
    report = paper.search(budget_s=400.0)
    assert report.best.knobs["data.image_size"] == 512
    assert report.best_fast.knobs["data.image_size"] == 256
    guard = next(guard for guard in report.guards if guard.key == "data.image_size")
    assert not guard.proven and guard.reward_difference == pytest.approx(-0.2, abs=0.02)
    fast = paper.tuned("fast").receipt
    assert fast is not None
    size = next(knob for knob in fast.changed if knob.key == "data.image_size")
    assert size.proof == "unproven" and size.reward_difference == guard.reward_difference


def test_a_size_that_keeps_its_reward_is_proven(tmp_path: Path) -> None:
    report = Paper(tmp_path).search(budget_s=400.0)
    assert next(guard for guard in report.guards if guard.key == "data.image_size").proven
    assert report.best.knobs["data.image_size"] == 256
    assert report.exact_share is not None and 0.0 < report.exact_share < 1.0


def test_the_gain_and_its_parts_tell_one_story_where_race_and_trials_disagree(tmp_path: Path) -> None:
    """In the race the winner is 20 % slower than in its own trial; what its one learning knob brings stays the same."""

    def slow_race(spec: TrialSpec) -> TrialOutcome | None:
        if spec.source != "race" or spec.knobs.get("data.image_size") != 256:
            return None
        outcome = paper.trials._measured(spec)
        return outcome.model_copy(update={"step_s": [1.2 * seconds for seconds in outcome.step_s]})

    paper = Paper(tmp_path, act=slow_race)
    report = paper.search(budget_s=900.0)
    learning = [row for row in report.contributions if row.kind == "learning"]
    assert report.best.raced and [row.key for row in learning] == ["data.image_size"] and learning[0].measured
    assert report.exact_share is not None and learning[0].factor is not None
    assert report.best.speedup ** (1.0 - report.exact_share) == pytest.approx(learning[0].factor)


def test_what_the_user_accepts_needs_no_proof(tmp_path: Path) -> None:
    paper = Paper(tmp_path, user_config(accept=["data.image_size"]), rewards={512: 0.5, 256: 0.3})
    report = paper.search()
    assert report.best.knobs["data.image_size"] == 256
    assert not [spec for spec in paper.trials.specs if spec.purpose == "rewards"]
    receipt = paper.tuned().receipt
    assert receipt is not None
    assert {knob.proof for knob in receipt.changed if knob.key == "data.image_size"} == {"accepted"}


def test_contributions_are_measured_and_multiply_to_the_gain(tmp_path: Path) -> None:
    report = Paper(tmp_path).search(budget_s=900.0)
    assert {row.key for row in report.contributions} == set(report.best.changed)
    assert all(row.measured and row.factor is not None for row in report.contributions)
    checkpointing = [row for row in report.contributions if row.key == "grpo.gradient_checkpointing"]
    assert not checkpointing or checkpointing[0].factor == pytest.approx(1.25, rel=0.05)


@pytest.mark.parametrize("budget_s", [60.0, 100.0, 180.0, 300.0])
def test_the_budget_is_kept_and_most_of_it_is_used(tmp_path: Path, budget_s: float) -> None:
    paper = Paper(tmp_path)
    report = paper.search(budget_s)
    assert paper.trials.now <= budget_s
    assert report.elapsed_s <= budget_s
    assert report.best.speedup >= 1.0


def test_a_budget_too_small_for_one_trial_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--budget: a budget of 8s is too small.*Give about \d+") as caught:
        Paper(tmp_path / "a").search(8.0)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"too small: no trial fits after the probe"):
        Paper(tmp_path / "b").search(22.0)


def test_a_budget_of_nothing_predicts_from_the_probe(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    report = paper.search(0.0)
    assert [spec.purpose for spec in paper.trials.specs] == ["probe"]
    assert report.ended == "prediction" and report.predicted
    assert report.best.speedup > 1.5 and report.best.number is None
    assert report.best.knobs["data.image_size"] == 512, "nothing is proven of a smaller image"
    assert report.best_fast.knobs["data.image_size"] == 256
    assert "predicted, not measured" in (tmp_path / "tuned.yaml").read_text()


def test_nothing_better_is_a_valid_answer(tmp_path: Path) -> None:
    knobs = {"grpo.gradient_checkpointing": [True, False], "grpo.per_device_train_batch_size": [16, 4]}
    best = user_config().to_dict()
    best["grpo"] |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    best["search"]["knobs"] |= {**knobs, "data.image_size": None, "grpo.num_generations": None}
    report = Paper(tmp_path, RunConfig.from_dict(best)).search()
    assert report.best.changed == {} and report.best.speedup == 1.0 and report.contributions == []
    assert report.ended == "exhausted"
    assert "your own configuration" in (tmp_path / "tuned.yaml").read_text()


def test_a_group_size_is_judged_by_what_it_brings_alone(tmp_path: Path) -> None:
    """A small image makes everything fast here; groups of 4 are worth less than groups of 8 at the same seconds."""
    config = user_config(accept=["data.image_size"]).to_dict()
    config["search"]["knobs"] |= {
        "grpo.num_generations": [4],
        "data.image_size": [512, 256],
        "grpo.per_device_train_batch_size": None,
        "grpo.gradient_checkpointing": None,
    }
    report = Paper(tmp_path, RunConfig.from_dict(config)).search(500.0)
    guards = [guard for guard in report.guards if guard.key == "grpo.num_generations"]
    assert guards and not guards[0].proven and "x 0." in guards[0].why
    assert report.best.knobs["grpo.num_generations"] == 8


def test_what_was_refuted_keeps_nothing_else_from_being_tried(tmp_path: Path) -> None:
    """A small image is fastest of all and costs reward; twice the prompts at the user's own size, the groups half as
    large and nearly all alive, still win."""
    config = user_config().to_dict()
    config["grpo"] |= {"num_generations": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    config["search"]["knobs"] |= {
        "grpo.num_generations": [16, 8],
        "grpo.per_device_train_batch_size": None,
        "grpo.gradient_checkpointing": None,
    }

    def act(spec: TrialSpec) -> TrialOutcome | None:
        small_groups = spec.config["grpo"]["num_generations"] == 8 and spec.purpose != "rewards"
        outcome = paper.trials._measured(spec)
        return outcome.model_copy(update={"step_s": [s / (1.5 if small_groups else 1.0) for s in outcome.step_s]})

    paper = Paper(tmp_path, RunConfig.from_dict(config), rewards={512: 0.5, 256: 0.3})
    paper.trials.act = act
    report = paper.search()
    assert report.best.changed == {"grpo.num_generations": 8} and report.best.raced
    assert [guard.proven for guard in report.guards] == [False, True]
    assert report.best_exact.changed == {}


def test_the_fastest_file_holds_what_was_too_late_for_a_race(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        late = spec.source == "race" and spec.config["data"]["image_size"] == 256
        return TrialOutcome(number=spec.number, status="timeout", elapsed_s=1.0) if late else None

    report = Paper(tmp_path, rewards={512: 0.5, 256: 0.3}, act=act).search(400.0)
    assert report.best.raced and report.best.knobs["data.image_size"] == 512
    fast = report.best_fast
    assert fast.knobs["data.image_size"] == 256 and not fast.raced and fast.worst_case == "passed"
    assert fast.ci[0] > report.best.ci[1]


def test_a_speed_up_and_both_its_steps_come_from_one_measurement(tmp_path: Path) -> None:
    """The machine is slower during the race: what was measured before is not mixed in."""
    paper = Paper(tmp_path)

    def act(spec: TrialSpec) -> TrialOutcome | None:
        found = paper.trials._measured(spec)
        factor = {"race": 1.5}.get(spec.source, 1.0)
        more = {"peak_bytes": 12 * 2**30} if spec.purpose == "worst_case" and found.status == "ok" else {}
        return found.model_copy(update={"step_s": [factor * s for s in found.step_s], **more})

    paper.trials.act = act
    best = paper.search().best
    receipt = paper.tuned().receipt
    assert best.raced and receipt is not None
    assert best.baseline_step_s == pytest.approx(1.5 * 1.2, rel=0.03)
    assert receipt.baseline_step_s == best.baseline_step_s and receipt.step_s == best.step_s
    assert best.peak_bytes == 12 * 2**30, "the worst case counts"


def test_a_speed_up_counts_generating_and_reusing_steps_alike() -> None:
    """Steps of 9, 1, 1 and 1 s against 5, 1, 1 and 1 s: 3 s on average against 2, though the medians are equal."""
    record = record_of(user_config())
    record = record.model_copy(update={"timings": record.timings.model_copy(update={"cycle": 4})})
    board = Leaderboard(user_config(), {"grpo.gradient_checkpointing": True}, record)
    for number, (value, first_s) in enumerate(((True, 9.0), (False, 5.0))):
        steps_s = [first_s, 1.0, 1.0, 1.0] * 3
        ok = TrialOutcome(number=number, status="ok", record=record, step_s=steps_s)
        board.add({"grpo.gradient_checkpointing": value}, ok, None)
    fast = board.ranking("exact")[0]
    assert fast.number == 1 and board.speedup(fast) == (1.5, 1.5, 1.5, 3)


def test_what_stood_its_worst_case_before_a_kill_is_raced_after_it(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        if spec.source == "race" and RunConfig.from_dict(spec.config) == user_config():
            raise Killed
        return None

    with pytest.raises(Killed):
        Paper(tmp_path, act=act).search()
    second = Paper(tmp_path)
    report = second.search(resume=True)
    assert report.best.raced and report.best.worst_case == "passed"
    again = [spec.knobs for spec in second.trials.specs if spec.purpose == "worst_case"]
    assert report.best.knobs not in again


@pytest.mark.parametrize("accept", [[], ["data.image_size"]])
def test_where_one_value_could_not_be_proven_in_time_others_are_not_tried(accept: list[str]) -> None:
    record = record_of(user_config())
    board = Leaderboard(user_config(accept=accept), {"data.image_size": 512}, record)
    board.add({"data.image_size": 512}, TrialOutcome(number=1, status="ok", record=record, step_s=[2.0] * 3), None)
    smaller = [{"data.image_size": 256}]
    assert len(rank(smaller, board, PaperModels(), None).proposals) == 1
    board.note(Guard(key="data.image_size", before=512, after=384, proven=False, why=NO_TIME))
    found = rank(smaller, board, PaperModels(), None)
    assert len(found.proposals) == len(accept)
    assert [row.why for row in found.rows()] == (
        [] if accept else ["there is no time to compare the rewards of other values of data.image_size"]
    )


@pytest.mark.parametrize("busy", [False, True])
def test_a_small_predicted_gain_is_in_the_first_rival_only_where_nobody_disturbed_the_probe(busy: bool) -> None:
    class Near(PaperModels):
        def step_s(self, config: RunConfig) -> Interval:
            value = (1.0 if config.grpo.get("dataloader_num_workers") else 1.06) / (1 + config.batch.micro_batch)
            return Interval(value, 0.5 * value, 2.0 * value)

    load = OtherLoad(cores=1.4, of=2, matters=True) if busy else None
    record = record_of(user_config()).model_copy(update={"others": load})
    micro, workers = "grpo.per_device_train_batch_size", "grpo.dataloader_num_workers"
    board = Leaderboard(user_config(), {micro: 2, workers: 0}, record)
    board.add({micro: 2, workers: 0}, TrialOutcome(number=1, status="ok", record=record, step_s=[2.0] * 3), None)
    first = rank([{micro: 8, workers: n} for n in (1, 0)], board, Near(), None).proposals[0]
    assert first.knobs[workers] == (0 if busy else 1)


def test_rewards_are_compared_on_as_many_prompts_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Leaderboard(user_config(), {"data.image_size": 512}, record_of(user_config()))
    evaluator = SimpleNamespace(board=board, models=PaperModels(), costs=SimpleNamespace(beside_s=0.0))
    rewards, asked = RewardTrials(cast(Any, evaluator)), list[int]()

    def measure(knobs: dict[str, Any], batches: int, limit_s: float) -> list[PromptReward]:
        asked.append(batches)
        return [PromptReward(prompt=n, rewards=[0.1, 0.2], truncated=0) for n in range(2 * batches)]

    monkeypatch.setattr(rewards, "_measure", measure)
    assert rewards.judge("data.image_size", 256, 2 * rewards.cost_s(64)).prompts == 64
    assert rewards.judge("data.image_size", 384, rewards.cost_s(16)).prompts == 16
    assert rewards.judge("data.image_size", 448, rewards.cost_s(256)).prompts == 64, "the user's own were 64"
    assert asked == [32, 32, 8, 32]


@pytest.mark.long
@pytest.mark.slow
def test_noise_is_not_sold_as_speed(tmp_path: Path) -> None:
    config = user_config().to_dict()
    config["search"]["knobs"] = dict.fromkeys(config["search"]["knobs"]) | {"grpo.num_generations": [8, 4]}
    report = Paper(tmp_path, RunConfig.from_dict(config), noise=0.3).search(400.0)
    assert report.best.changed == {} or report.best.ci[0] > 1.0


def test_ctrl_c_ends_with_the_best_so_far(tmp_path: Path) -> None:
    calls = itertools.count()

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return None

    paper = Paper(tmp_path, act=act)
    report = paper.search()
    assert report.ended == "interrupted" and report.best_fast.speedup > 1.0
    assert paper.trials.closed and paper.tuned("exact").receipt is not None


def test_ctrl_c_before_anything_was_measured_is_a_ctrl_c(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Paper(tmp_path, act=act).search()


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_after_a_kill_at_most_the_running_trial_is_run_again(tmp_path: Path, at: int) -> None:
    calls = itertools.count()

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if next(calls) == at:
            raise Killed
        return None

    first = Paper(tmp_path, act=act)
    with pytest.raises(Killed):
        first.search()
    begun = list(first.trials.specs)
    second = Paper(tmp_path)
    report = second.search(resume=True)
    assert [row.number for row in report.trials[:at]] == [spec.number for spec in begun[:at]]
    again = {json.dumps([spec.purpose, spec.knobs], sort_keys=True) for spec in begun[:at]}
    timed = [
        spec
        for spec in second.trials.specs
        if spec.purpose in ("probe", "timed") and spec.source not in ("race", "again")
    ]
    assert not again & {json.dumps([spec.purpose, spec.knobs], sort_keys=True) for spec in timed}
    assert report.elapsed_s > second.trials.now, "the time of the first process counts"


def test_a_lost_journal_is_built_again_from_the_trials(tmp_path: Path) -> None:
    first = Paper(tmp_path)
    report = first.search()
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])
    second = Paper(tmp_path)
    again = second.search(600.0, resume=True)
    known = [row.knobs for row in report.trials if row.purpose == "timed"]
    assert not [spec for spec in second.timed() if spec.source in ("models", "sampler") and spec.knobs in known]
    assert again.best.speedup == pytest.approx(report.best.speedup, rel=0.1)


def test_a_finished_folder_is_not_entered_by_mistake(tmp_path: Path) -> None:
    Paper(tmp_path).search()
    with pytest.raises(ConfigError, match=r"finished.*--resume"):
        Paper(tmp_path).search()
    with pytest.raises(ConfigError, match="spent"):
        Paper(tmp_path).search(30.0, resume=True)


def test_another_configuration_is_not_gone_on_with(tmp_path: Path) -> None:
    Paper(tmp_path).search()
    other = user_config().to_dict()
    other["model"]["name_or_path"] = "other"
    with pytest.raises(ConfigError, match="another configuration"):
        Paper(tmp_path, RunConfig.from_dict(other)).search(600.0, resume=True)


def test_a_folder_whose_configuration_leaves_speed_ups_out_was_searched_without_them(tmp_path: Path) -> None:
    plain = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d.jsonl"},
        "rewards": [{"name": "exact_match"}],
        "grpo": {"max_steps": 3},
    }
    assert fingerprint_of(RunConfig.from_dict({**plain, "speedups": "none"}), None) == "2bad662bf0509993", "as stored"
    assert fingerprint_of(RunConfig.from_dict({**plain, "speedups": "auto"}), None) == "e77b0e958d878efa", "as stored"
    Paper(tmp_path, RunConfig.from_dict({**user_config().to_dict(), "speedups": "none"})).search()
    with pytest.raises(ConfigError, match=r"without speed-ups.*--set speedups=none"):
        Paper(tmp_path, RunConfig.from_dict({**user_config().to_dict(), "speedups": "auto"})).search(600.0, resume=True)


def test_a_stored_trial_of_a_script_that_leaves_speed_ups_out_had_none() -> None:
    config = user_config().to_dict()
    del config["speedups"]
    limits = {"limit_s": 1.0, "hang_s": 1.0, "steps": 1}
    spec = TrialSpec(number=1, purpose="timed", config=config, knobs={}, script=["train.py"], **limits)
    evaluator = cast(Evaluator, SimpleNamespace(board=SimpleNamespace(baseline_knobs={"speedups": "none"})))
    assert Evaluator.knobs_of(evaluator, spec) == {"speedups": "none"}


def test_two_searches_in_one_folder(tmp_path: Path) -> None:
    with SearchFolder(tmp_path).locked(), pytest.raises(ConfigError, match="another search is running"):
        Paper(tmp_path).search()
    Paper(tmp_path).search()


def test_a_configuration_that_cannot_be_measured_is_said_so(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        return TrialOutcome(number=spec.number, status="reward_failed", why="r raised ValueError", elapsed_s=3.0)

    with pytest.raises(NothingSucceeded, match=r"reward_failed.*r raised ValueError") as caught:
        Paper(tmp_path, act=act).search()
    assert caught.value.exit_code == 4


def test_data_that_training_refuses_ends_a_search_with_the_same_line(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        why = "rows.jsonl, row 3: the prompt is None"
        return TrialOutcome(number=spec.number, status="invalid", why=why, error_type="DataError", elapsed_s=3.0)

    with pytest.raises(DataError, match=r"^rows\.jsonl, row 3: the prompt is None$"):
        Paper(tmp_path, act=act).search()
    Paper(tmp_path, user_config(accept=["data.image_size"])).search()  # in the same folder, with another configuration


def test_a_reward_that_starts_to_fail_ends_the_search_with_what_there_is(tmp_path: Path) -> None:
    calls = itertools.count()

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if next(calls) >= 4 and spec.source != "race":
            return TrialOutcome(number=spec.number, status="reward_failed", why="r raised", elapsed_s=5.0)
        return None

    report = Paper(tmp_path, act=act).search(600.0)
    assert report.ended == "failing" and "reward_failed" in report.why_ended
    assert len([row for row in report.trials if row.status == "reward_failed" and row.purpose == "timed"]) <= 6
    assert report.best_exact.speedup >= 1.0


def test_a_winner_that_dies_in_the_worst_case_does_not_win(tmp_path: Path) -> None:
    died: list[dict[str, Any]] = []

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if spec.purpose == "worst_case" and not died:
            died.append(spec.knobs)
            return TrialOutcome(number=spec.number, status="oom", why="out of memory", elapsed_s=5.0)
        return None

    report = Paper(tmp_path, act=act).search()
    assert died and report.best.knobs != died[0]
    assert any("worst-case" in note for note in report.notes)


def test_no_spread_of_rewards_leaves_the_group_alone(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        if spec.purpose != "probe":
            return None
        dead = token_facts(groups=8, dead_groups=8, pass_rates=[0.0] * 8)
        record = record_of(user_config()).model_copy(update={"tokens": dead})
        return TrialOutcome(number=0, status="ok", record=record, step_s=[1.2] * 3, elapsed_s=8.0)

    paper = Paper(tmp_path, act=act)
    report = paper.search()
    assert {spec.knobs["grpo.num_generations"] for spec in paper.timed()} == {8}
    assert any("spread" in note for note in report.notes)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    calls = itertools.count()

    def act(spec: TrialSpec) -> TrialOutcome | None:
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return None

    with pytest.raises(EnvironmentProblem, match=r"the disk is full.*--resume"):
        Paper(tmp_path, act=act).search()
    assert Paper(tmp_path).search(resume=True).best.speedup > 1.0


def test_a_run_may_not_take_longer_for_more_useful_completions(tmp_path: Path) -> None:
    report = Paper(tmp_path).search()
    assert all(row.knobs.get("grpo.num_generations", 8) in (4, 8) for row in report.trials)
    assert report.best.step_s < report.baseline.step_s


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("0", 0), ("1.5m", 90)])
def test_budgets_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-3s", "3d", "1h 30m x", "0s0"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        parse_budget(text)


def test_the_budget_and_the_costs_learn() -> None:
    now = [100.0]
    budget = Budget(100.0, 20.0, lambda: now[0])
    now[0] = 130.0
    assert budget.elapsed_s == 50.0 and budget.left_s == 48.0 and budget.search_left_s == 28.0
    alone, costs = Costs(warm=False), Costs()
    assert costs.trial_s(2.0, 3) == 6.0
    for found in (alone, costs):
        found.learn(TrialOutcome(number=0, status="ok", step_s=[1.0, 1.0], elapsed_s=22.0))
    assert alone.trial_s(1.0, 2) == 22.0 and costs.trial_s(1.0, 2) == 10.0
    evaluated, record = Costs(warm=False), demo_record(occasions={"evaluate": 90.0}, occasions_s=9.0)
    evaluated.learn(TrialOutcome(number=0, status="ok", step_s=[1.0, 1.0], elapsed_s=31.0, record=record))
    assert evaluated.trial_s(1.0, 2) == pytest.approx(22.0)  # no later trial evaluates
    costs.learn(TrialOutcome(number=1, status="ok", step_s=[1.0], elapsed_s=3.0, warm=True))
    assert costs.beside_s == 2.0 + 0.5 * 20.0 and costs.starts_s(2, warm=False) == 1.5 * 20.0
    assert costs.starts_s(2, warm=True) == 2 * costs.beside_s
    assert costs.starts_s(4, warm=True) == costs.starts_s(4, warm=False) == 1.5 * 1.5 * 20.0


def test_lengths_are_drawn_as_the_probe_saw_them() -> None:
    seen = spread(12, 20, 30).model_copy(update={"mean": 13.0})
    lengths = completion_lengths(demo_record(tokens=token_facts(completion=seen)))
    assert lengths is not None and len(lengths) == 200
    assert sum(lengths) / 200 == pytest.approx(13.0, abs=0.3)
    assert sorted(lengths)[100] == pytest.approx(12, abs=1) and max(lengths) <= 30 and min(lengths) >= 1
    assert completion_lengths(demo_record(tokens=None)) is None


@pytest.mark.parametrize(("expected_s", "least_s"), [(5.0, 60.0), (50.0, 150.0)])
def test_a_trial_may_wait_for_an_engine_of_its_own(expected_s: float, least_s: float) -> None:
    plain = user_config()
    assert patience_s(expected_s, plain) == least_s
    for vllm, starts in (({}, True), ({"server_gpus": 0}, True), ({"mode": "server"}, False)):
        served = RunConfig.from_dict({**plain.to_dict(), "grpo": {"use_vllm": True}, "vllm": vllm})
        assert patience_s(expected_s, served) == least_s + ENGINE_S * starts


@pytest.mark.parametrize("gpus", [0, 1])
def test_vllm_is_tried_first_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """No formula tells what it brings, and it changes what is learned: by prediction it would come last."""
    monkeypatch.setattr(engine_knobs, "installed", lambda package: True)
    micro, vllm = "grpo.per_device_train_batch_size", "grpo.use_vllm"
    knobs = {row.key: None for row in TABLE} | {micro: [2, 4, 8], vllm: [False, True]}
    card = Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30, capability="9.0")
    machine = MACHINE.model_copy(update={"gpus": (card,) * gpus})
    if not gpus:
        monkeypatch.setattr(engine_knobs, "engine_rule", lambda context, value: None)
    paper = Paper(tmp_path, user_config(knobs=knobs))
    paper.search(machine=machine)
    first = paper.timed()[1].knobs
    assert first == ({micro: 2, vllm: True} if gpus else {micro: 8, vllm: False})
    if gpus:
        assert paper.timed()[2].knobs[micro] > 2, "once is enough"
