"""The study: what it remembers, what it proposes, and what a torn journal or another model's costs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.search.storage import driver_url, journal_storage, mend_journal, shared_storage
from grpo_autotune.search.study import Axes, Claim, Sampler, Study, name_of

VALUES = {
    "data.image_size": (512, 128, 256),
    "grpo.num_generations": (8, 4),
    "grpo.gradient_checkpointing": (True, False),
    "speedups": ("none", ["shared_prefix"]),
    "grpo.beta": (0.0,),
}
AXES = Axes.of(VALUES)


def combination(size: int = 512, group: int = 8, checkpointing: bool = True, speedups: Any = "none") -> dict[str, Any]:
    values = (size, group, checkpointing, speedups, 0.0)
    return dict(zip(VALUES, values, strict=True))


def pool() -> list[dict[str, Any]]:
    return [
        combination(size, group, checkpointing, speedups)
        for size in VALUES["data.image_size"]
        for group in VALUES["grpo.num_generations"]
        for checkpointing in (True, False)
        for speedups in VALUES["speedups"]
    ]


def opened(path: Path, fingerprint: str = "one", sampler: Sampler = "tpe") -> Study:
    return Study(journal_storage(path), AXES, fingerprint, where=str(path), sampler=sampler)


def told(study: Study, knobs: dict[str, Any], score: float, number: int) -> Claim:
    claim = study.ask(knobs)
    study.tell(claim, score, number, {"step_s": 1 / score}, 2.0)
    return claim


def test_knobs_and_parameters_are_two_ways_of_saying_the_same() -> None:
    for knobs in pool():
        assert AXES.knobs(AXES.params(knobs)) == knobs
    assert AXES.values["data.image_size"] == (128, 256, 512)
    assert AXES.distance(combination(128), combination(512)) == 1.0
    assert AXES.distance(combination(128), combination(256)) == 0.5


def test_the_user_s_configuration_comes_first_and_everything_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = opened(path)
    assert told(study, combination(), 2.0, 1).knobs == combination()
    told(study, combination(256), 3.0, 2)
    study.fail(study.ask(combination(128)), "a reward raised", 3)
    again = opened(path)
    assert again.scores() == [(combination(256), 3.0), (combination(), 2.0)]
    assert again.taken() == {name_of(combination()), name_of(combination(256))}
    assert again.numbers() == {1, 2, 3}


def test_out_of_memory_is_seen_by_samplers_and_never_best(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.journal")
    told(study, combination(), 2.0, 1)
    told(study, combination(256), 3.0, 2)
    study.tell_infeasible(study.ask(combination(128)), 3, {"why": "oom"}, over_gib=1.5)
    trial = study._study.trials[-1]
    assert trial.state is optuna.trial.TrialState.COMPLETE
    assert trial.value == 2.0 and trial.constraints == {"memory_gib": 1.5, "time": 0.0}
    assert name_of(combination(128)) in study.taken()
    assert combination(128) not in [knobs for knobs, _ in study.scores()]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_what_the_sampler_proposes_is_in_the_pool_and_new(tmp_path: Path, sampler: Sampler) -> None:
    study = opened(tmp_path / "study.journal", sampler=sampler)
    left = [knobs for knobs in pool() if knobs["grpo.num_generations"] == 8 or knobs["grpo.gradient_checkpointing"]]
    told(study, combination(), 1.0, 1)
    left.remove(combination())
    seen = {name_of(combination())}
    for number in range(2, 8):
        claim = study.suggest(left)
        assert claim.knobs in left and name_of(claim.knobs) not in seen
        seen.add(name_of(claim.knobs))
        left.remove(claim.knobs)
        study.tell(claim, random.Random(number).random(), number, {}, 1.0)
    assert study.taken() == seen


def test_another_model_s_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    opened(path, "one")
    with pytest.raises(ConfigError, match="another configuration") as caught:
        opened(path, "two")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.35, 0.5, 0.9, 0.99])
def test_a_journal_cut_anywhere_opens_and_goes_on(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "study.journal"
    study = opened(path)
    for number, knobs in enumerate(pool()[:6]):
        told(study, knobs, 1.0 + number, number)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    path.with_name("study.journal.lock").symlink_to(path)
    again = opened(path)
    before = len(again.scores())
    assert before <= 6
    told(again, combination(128, 4, False, ["shared_prefix"]), 9.0, 9)
    assert opened(path).scores()[0] == (combination(128, 4, False, ["shared_prefix"]), 9.0)
    assert len(opened(path).scores()) == before + 1


def test_only_the_torn_end_of_a_journal_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"a":1}\n{"b":2}\n{"c"')
    assert mend_journal(path) == 4
    assert path.read_bytes() == b'{"a":1}\n{"b":2}\n'
    assert path.with_name("j.torn").read_bytes() == b'{"c"'
    assert mend_journal(path) == 0


def test_what_a_killed_process_left_running_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = opened(path)
    told(study, combination(), 1.0, 1)
    study.ask(combination(256))
    study._study.enqueue_trial(AXES.params(combination(128)))
    again = opened(path)
    assert name_of(combination(256)) in again.taken()
    again.fail_abandoned()
    assert again.taken() == {name_of(combination())}
    assert again.ask(combination(256, 4)).knobs == combination(256, 4)


def test_databases_that_cannot_be_used_are_one_line() -> None:
    assert driver_url("postgresql://u@h/d") == "postgresql+psycopg://u@h/d"
    with pytest.raises(ConfigError, match="does not answer"):
        shared_storage("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(ConfigError, match="does not answer"):
        shared_storage("nonsense")
