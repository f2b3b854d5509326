"""The last race decides between several: the leader without each small change, and what comes close to it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.final_race import FIRST_ROUNDS
from grpo_autotune.search.folder import SearchFolder
from grpo_autotune.search.session import search
from tests.support.paper_machine import GIB, MACHINE, Listener, PaperModels, PaperTrials, record_of, user_config

MICRO, CHECKPOINTING = "grpo.per_device_train_batch_size", "grpo.gradient_checkpointing"
WORKERS, GROUP = "grpo.dataloader_num_workers", "grpo.num_generations"
RIGHT = {CHECKPOINTING: False, "speedups": "auto"}


def step_s(config: RunConfig, gain: float = 1.2) -> float:
    """12 s of the user's; with speed-ups micro batches make no difference, and checkpointing one of `gain`."""
    shared = config.speedups != "none"
    own_s = 12.0 if shared else 8.4 + 7.2 / config.batch.micro_batch
    return own_s / (2.4 if shared else 1.0) / (1.0 if config.grpo.get("gradient_checkpointing") else gain)


class Models(PaperModels):
    """Models of that machine."""

    def step_s(self, config: RunConfig) -> Any:
        value = self.error * step_s(config)
        return super().step_s(config)._replace(value=value, low=0.7 * value, high=1.4 * value)

    def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Any:
        return super().peak_bytes(user_config())

    def learn(self, config: RunConfig, outcome: TrialOutcome) -> Models:
        return Models(self.error)


class Drifting(PaperTrials):
    """A machine whose pace drifts by 12 % within a minute; steps of a race take turns on its clock."""

    def __init__(self, folder: Path, seed: int, drifts: float = 0.12, together: int = 9, gain: float = 1.2) -> None:
        super().__init__(folder, lengths=[[3, 4]], startup_s=15.0)
        self.random, self.drifts, self.together = np.random.default_rng(seed), drifts, together
        self.gain = gain
        self.pace, self.seen_s = self.random.normal(0.0, drifts), 0.0
        self.races, self.rounds = list[list[TrialSpec]](), list[int]()

    def run(self, spec: TrialSpec, watch: Any = None) -> TrialOutcome:
        folder, config, begun_s = self._begun(spec, watch), RunConfig.from_dict(spec.config), self.now
        self.now += self.startup_s * (1.5 if spec.purpose == "probe" else 0.4)
        steps = [self.step(config) for _ in range(spec.warmup + spec.steps)][spec.warmup :]
        return self.ended(spec, folder, steps, begun_s)

    def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]:
        self.races.append(list(specs))
        self.rounds.append(rounds)
        folders, begun_s = [self._begun(spec, None) for spec in specs], self.now
        configs = [RunConfig.from_dict(spec.config) for spec in specs]
        self.now += 0.75 * self.startup_s * len(specs)
        if len(specs) > self.together:
            return [TrialOutcome(number=spec.number, status="oom", why="no room") for spec in specs]
        for config in configs:
            self.step(config)
        steps: list[list[float]] = [[] for _ in specs]
        for done in range(rounds):
            for lane in list(range(len(specs)))[:: -1 if done % 2 else 1]:
                steps[lane].append(self.step(configs[lane]))
        return [self.ended(*lane, begun_s) for lane in zip(specs, folders, steps, strict=True)]

    def step(self, config: RunConfig) -> float:
        stays = math.exp((self.seen_s - self.now) / 60.0)
        self.pace = stays * self.pace + math.sqrt(1.0 - stays**2) * self.random.normal(0.0, self.drifts)
        self.seen_s, took_s = self.now, step_s(config, self.gain) * math.exp(self.pace + self.random.normal(0.0, 0.08))
        self.now += took_s
        return took_s

    def ended(self, spec: TrialSpec, folder: Path, steps: list[float], begun_s: float) -> TrialOutcome:
        outcome = TrialOutcome(
            number=spec.number, status="ok", record=record_of(RunConfig.from_dict(spec.config)), step_s=steps,
            peak_bytes=3 * GIB, elapsed_s=self.now - begun_s, warm=spec.number > 0,
            lengths=self.lengths if spec.purpose == "probe" else [],
        )  # fmt: skip
        (folder / "outcome.json").write_text(outcome.model_dump_json())
        return outcome


def searched(
    folder: Path,
    seed: int = 0,
    resume: bool = False,
    memory_gib: int = 32,
    micro: Sequence[int] = (1, 2, 4, 8, 16),
    machine: type[Drifting] = Drifting,
    **more: Any,
) -> tuple[SearchReport, Drifting]:
    axes = {MICRO: list(micro), CHECKPOINTING: [True, False], "speedups": ["none", "auto"]}
    values = user_config().to_dict() | {"data": {"path": "texts"}}
    values["search"]["knobs"] = dict.fromkeys(values["search"]["knobs"]) | axes
    values["search"]["seed"] = seed
    values["grpo"]["max_steps"] = 400
    paper = machine(folder, seed, **more)
    report = search(
        RunConfig.from_dict(values), budget_s=720.0, out=None, run_dir=folder, view=Listener(), runner=lambda _: paper,
        fit=lambda *probe: Models(), clock=paper.clock, resume=resume,
        machine=MACHINE.model_copy(update={"memory_bytes": memory_gib * GIB}),
    )  # fmt: skip
    return report, paper


def test_most_searches_on_a_machine_that_drifts_name_the_same_winner(tmp_path: Path) -> None:
    """By their trials alone, half of them name another one."""
    reports = [searched(tmp_path / str(seed), seed)[0] for seed in range(10)]
    assert all(report.best.raced and report.best.worst_case == "passed" for report in reports)
    assert sum(report.best.changed == RIGHT for report in reports) >= 8


def test_what_a_change_brings_is_told_beside_the_race_without_a_trial_for_it(tmp_path: Path) -> None:
    report, paper = searched(tmp_path, drifts=0.0, micro=[2])
    assert report.best.changed == RIGHT and len(paper.races[0]) == 3
    lanes = [spec.knobs for spec in paper.races[0]]
    assert lanes[0][CHECKPOINTING] and lanes[0]["speedups"] == "none", "the user's own is the first"
    assert any(knobs["speedups"] == "auto" and knobs[CHECKPOINTING] for knobs in lanes), "without the small change"
    row = next(row for row in report.contributions if row.key == CHECKPOINTING)
    assert row.measured and row.low is not None and row.high is not None and row.low < 1.2 < row.high
    assert not any(spec.source == "revert" and spec.knobs[CHECKPOINTING] for spec in paper.specs)


@pytest.mark.parametrize("why", ["memory is known to be short", "memory turns out to be short"])
def test_those_that_do_not_fit_together_are_raced_in_twos(tmp_path: Path, why: str) -> None:
    """Each of them needs 2.8 GiB."""
    known = why.startswith("memory is known")
    report, paper = searched(tmp_path, drifts=0.0, memory_gib=8 if known else 32, together=9 if known else 2)
    assert report.best.raced and report.best.changed.items() >= RIGHT.items() and report.best.worst_case == "passed"
    sizes = [len(lanes) for lanes in paper.races]
    assert (sizes[0] > 2) is not known and set(sizes[not known :]) == {2}


def test_a_search_that_goes_on_knows_what_was_decided_side_by_side(tmp_path: Path) -> None:
    before, _ = searched(tmp_path, drifts=0.0)
    state = json.loads(SearchFolder(tmp_path).state_file.read_text())
    SearchFolder(tmp_path).state_file.write_text(json.dumps(state | {"finished": False}))
    after, again = searched(tmp_path, drifts=0.0, resume=True)
    assert not again.races and after.best.knobs == before.best.knobs and after.best.ci == before.best.ci
    assert after.baseline.step_s == before.baseline.step_s, "the probe's, not the race's"
    factors = [[(row.key, row.factor) for row in report.contributions] for report in (before, after)]
    assert factors[0] == factors[1]


def test_the_worst_case_of_what_only_a_race_has_measured_outlasts_a_kill(tmp_path: Path) -> None:
    before, paper = searched(tmp_path, drifts=0.0, micro=[2])
    assert before.best.changed == RIGHT and before.best.worst_case == "passed"
    for spec in paper.specs:
        if spec.purpose == "timed" and spec.source != "race" and spec.knobs == before.best.knobs:
            shutil.rmtree(SearchFolder(tmp_path).trial(spec.number))
    state = json.loads(SearchFolder(tmp_path).state_file.read_text())
    SearchFolder(tmp_path).state_file.write_text(json.dumps(state | {"finished": False}))
    after, again = searched(tmp_path, drifts=0.0, micro=[2], resume=True)
    assert after.best.changed == RIGHT and after.best.worst_case == "passed" and after.best.raced
    assert not any(spec.purpose == "worst_case" and spec.knobs == before.best.knobs for spec in again.specs)


def test_two_of_whom_one_fails_beside_the_other_are_not_started_again_and_again(tmp_path: Path) -> None:
    class Failing(Drifting):
        def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]:
            outcomes = super().race(specs, rounds=rounds, deadline_s=deadline_s)
            if len(specs) > 2 or specs[0].knobs["speedups"] == "none":
                return outcomes
            crash = {"status": "crashed", "why": "broken", "step_s": []}
            return [outcomes[0].model_copy(update=crash), *outcomes[1:]]

    failed = 0
    for seed in range(6):
        _, paper = searched(tmp_path / str(seed), seed, machine=Failing)
        pairs = [str([spec.knobs for spec in specs]) for specs in paper.races if len(specs) == 2]
        assert len(set(pairs)) == len(pairs)
        failed += sum(specs[0].knobs["speedups"] == "auto" for specs in paper.races if len(specs) == 2)
    assert failed


def test_where_nothing_runs_side_by_side_the_winner_has_its_worst_case_all_the_same(tmp_path: Path) -> None:
    report, paper = searched(tmp_path, together=1)
    assert not report.best.raced and report.best.worst_case == "passed" and report.best.changed
    of_several = [lanes for lanes in paper.races if len(lanes) > 2]
    assert len(of_several) == len({str(lanes[1].knobs) for lanes in of_several}), "tried once"


def test_where_one_of_several_crashes_the_race_begins_anew_with_two_and_a_single_round_tells_nothing(
    tmp_path: Path,
) -> None:
    class Crashing(Drifting):
        def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]:
            outcomes = super().race(specs, rounds=1 if len(specs) > 2 else rounds, deadline_s=deadline_s)
            crash = {"status": "crashed", "why": "broken", "step_s": []}
            bad = [len(specs) > 2 and spec.knobs == specs[2].knobs for spec in specs]
            return [o.model_copy(update=crash) if b else o for o, b in zip(outcomes, bad, strict=True)]

    report, paper = searched(tmp_path, drifts=0.0, machine=Crashing)
    first, second = paper.races
    assert len(first) > 2 and [spec.knobs for spec in second] == [spec.knobs for spec in first[:2]]
    assert report.best.raced
    assert all(row.low is not None and row.high is not None and row.low < row.high for row in report.contributions)


def test_rounds_that_two_made_beside_others_count_in_their_own_race(tmp_path: Path) -> None:
    def decided(seed: int) -> tuple[int, int] | None:
        """Rounds of the last verdict on two that also raced alone, and those of all races of both."""
        _, paper = searched(tmp_path / str(seed), seed)
        pairs = [[spec.knobs for spec in specs] for specs in paper.races if len(specs) == 2]
        for row in reversed(SearchFolder(tmp_path / str(seed)).races()):
            both = [row.before, row.rival]
            if row.before["speedups"] == "auto" and (both in pairs or both[::-1] in pairs):
                lanes = ([spec.knobs for spec in specs] for specs in paper.races)
                made = [n for n, knobs in zip(paper.rounds, lanes, strict=True) if all(one in knobs for one in both)]
                return row.speedup[3], sum(made)
        return None

    seen, made = next(filter(None, map(decided, range(20))))
    assert seen == made >= FIRST_ROUNDS
