"""The Optuna study: the combinations that any machine tried, their scores, and the sampler's next proposal.

Ask and tell, since `optimize(timeout=)` cannot interrupt a trial. The study lies in a journal in the run folder, or in
a database that several machines share; then a trial's heartbeat is kept here while it runs, and those of machines that
died are put back into the queue. A trial that ran out of memory is told as complete, with a constraint and the worst
feasible value, because samplers do not see a trial that failed.
"""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import same_value
from grpo_autotune.search.storage import HEARTBEAT_S, quiet

Sampler = Literal["tpe", "gp", "random"]
Attributes = Mapping[str, Any]

NAME = "grpo-autotune"
STARTUP_TRIALS = 4
MEMORY = "memory_gib"
TIME = "time"


@dataclass(frozen=True)
class Axes:
    """Knob values as Optuna's parameters: numbers by their rank, since values such as 128, 256, 768 have an order and
    no step, everything else as a category; a knob of one value is no parameter."""

    values: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Any]]) -> "Axes":
        """Sort each knob's numbers; other values keep their order."""
        return cls({key: tuple(sorted(axis) if _numbers(axis) else axis) for key, axis in values.items()})

    def distributions(self) -> dict[str, BaseDistribution]:
        """Of the knobs that have a choice."""
        return {
            key: IntDistribution(0, len(axis) - 1)
            if _numbers(axis)
            else CategoricalDistribution([json.dumps(value) for value in axis])
            for key, axis in self.values.items()
            if len(axis) > 1
        }

    def params(self, knobs: Knobs) -> dict[str, Any]:
        return {
            key: self.values[key].index(knobs[key]) if _numbers(self.values[key]) else json.dumps(knobs[key])
            for key in self.distributions()
        }

    def knobs(self, params: Mapping[str, Any]) -> Knobs:
        return {
            key: axis[0] if len(axis) == 1 else axis[params[key]] if _numbers(axis) else json.loads(params[key])
            for key, axis in self.values.items()
        }

    def distance(self, left: Knobs, right: Knobs) -> float:
        """Distance of two combinations: ranks as shares of their axis, other values 0 or 1."""
        total = 0.0
        for key, axis in self.values.items():
            if _numbers(axis) and len(axis) > 1:
                total += abs(axis.index(left[key]) - axis.index(right[key])) / (len(axis) - 1)
            else:
                total += left[key] != right[key]
        return total


@dataclass(frozen=True)
class Claim:
    """A combination that this process has taken on, until its result is told or it is released."""

    knobs: Knobs
    trial: optuna.Trial


def name_of(knobs: Knobs) -> str:
    """The same text for the same combination."""
    return json.dumps(knobs, sort_keys=True)


def differing(left: Knobs, right: Knobs) -> list[str]:
    """Knobs of the first whose values have another name in the second."""
    unequal = (key for key, value in left.items() if not same_value(value, right[key]))  # names take longer
    return [key for key in unequal if name_of({key: left[key]}) != name_of({key: right[key]})]


def distance(left: Knobs, right: Knobs) -> tuple[int, float]:
    """Number of knobs that differ, and how far apart their numbers are, by their logarithms."""
    keys = differing(left, right)
    numbers = [(left[key], right[key]) for key in keys if _numbers((left[key], right[key]))]
    return len(keys), math.fsum(abs(math.log1p(abs(one)) - math.log1p(abs(two))) for one, two in numbers)


class Study:
    """One study, opened. `fingerprint` is of the configuration and the space, ConfigError where the study there belongs
    to others; `where` names the storage in messages."""

    def __init__(
        self, storage: BaseStorage, axes: Axes, fingerprint: str, *, where: str, seed: int = 0, sampler: Sampler = "tpe"
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.axes = axes
        self._storage = storage
        self._beats: dict[int, _Heartbeat] = {}
        with quiet():
            self._study = optuna.create_study(
                study_name=NAME,
                storage=storage,
                sampler=_sampler(sampler, seed),
                direction="maximize",
                load_if_exists=True,
            )
        stored = self._study.user_attrs.get("fingerprint")
        if stored is None:
            self._study.set_user_attr("fingerprint", fingerprint)
            self._study.set_user_attr("knobs", {key: list(axis) for key, axis in axes.values.items()})
        elif stored != fingerprint:
            what = "the study there belongs to another configuration, or to other knobs"
            fix = "Search in another folder or database, or with the configuration it was begun with."
            raise ConfigError(what, where=where, fix=fix)

    def ask(self, knobs: Knobs) -> Claim:
        """Take on a combination. Where the queue of a shared study holds another machine's, that one comes first."""
        self._put_back_stale()
        self._study.enqueue_trial(self.axes.params(knobs))
        return self._take()

    def suggest(self, pool: Sequence[Knobs]) -> Claim:
        """Take on the sampler's proposal; where that is not in `pool` (illegal, or known), the nearest that is."""
        self._put_back_stale()
        claim = self._take()
        if name_of(claim.knobs) in {name_of(knobs) for knobs in pool}:
            return claim
        self.fail(claim, "not legal, or already known")
        return self.ask(min(pool, key=lambda knobs: self.axes.distance(claim.knobs, knobs)))

    def tell(self, claim: Claim, score: float, number: int, attributes: Attributes, headroom_gib: float) -> None:
        """Tell the score of a measured trial, and the memory that it left."""
        self._note(claim, number, attributes, {MEMORY: min(0.0, -headroom_gib), TIME: 0.0})
        self._finish(claim, score, TrialState.COMPLETE)

    def tell_infeasible(
        self, claim: Claim, number: int, attributes: Attributes, *, over_gib: float = 0.0, over_time: float = 0.0
    ) -> None:
        """Tell of a trial that ran out of memory, or of its own time: worse than every feasible one, and why."""
        self._note(claim, number, attributes, {MEMORY: over_gib, TIME: over_time})
        values = [trial.value for trial in self._feasible() if trial.value is not None]
        self._finish(claim, min(values, default=0.0), TrialState.COMPLETE)

    def fail(self, claim: Claim, why: str, number: int | None = None) -> None:
        """Tell of a trial that says nothing about its knobs; samplers will not see it."""
        self._note(claim, number, {"why": why})
        self._finish(claim, None, TrialState.FAIL)

    def release(self, claim: Claim) -> None:
        """Put a combination back into the queue for another machine."""
        self.fail(claim, "released")
        self._study.enqueue_trial(self.axes.params(claim.knobs))

    def taken(self) -> set[str]:
        """Names of all combinations that were told, or are under way anywhere."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        trials = self._study.get_trials(deepcopy=False, states=states)
        return {name_of(self.axes.knobs(trial.params)) for trial in trials if self._is_whole(trial)}

    def scores(self) -> list[tuple[Knobs, float]]:
        """Every feasible combination and its score, best first, whoever measured it."""
        scores = [(self.axes.knobs(trial.params), float(trial.value or 0.0)) for trial in self._feasible()]
        return sorted(scores, key=lambda pair: -pair[1])

    def numbers(self) -> set[int]:
        """Numbers of the run folder's trials that are finished in the study."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        return {trial.user_attrs["number"] for trial in trials if trial.user_attrs.get("number") is not None}

    def close(self) -> None:
        """Stop all heartbeats; a trial in hand counts as lost from here on."""
        for beat in self._beats.values():
            beat.stop()
        self._beats.clear()
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    def fail_abandoned(self) -> None:
        """Fail the trials that an earlier process left running, in a folder that no other machine uses."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            if trial.state is TrialState.WAITING:
                self._study.ask()  # only a running trial can be told
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _take(self) -> Claim:
        with quiet():
            trial = self._study.ask(fixed_distributions=self.axes.distributions())
        claim = Claim(self.axes.knobs(trial.params), trial)
        trial.set_user_attr("knobs", claim.knobs)
        if isinstance(self._storage, RDBStorage):
            self._beats[trial.number] = _Heartbeat(self._storage, trial._trial_id)
        return claim

    def _note(
        self, claim: Claim, number: int | None, attributes: Attributes, constraints: Mapping[str, float] | None = None
    ) -> None:
        # Another machine may have given a silent trial up; then its retry will give the score.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, value in (constraints or {}).items():
                claim.trial.set_constraint(name, value)
            for key, value in {"number": number, **attributes}.items():
                claim.trial.set_user_attr(key, value)

    def _finish(self, claim: Claim, value: float | None, state: TrialState) -> None:
        beat = self._beats.pop(claim.trial.number, None)
        if beat is not None:
            beat.stop()
        self._study.tell(claim.trial, value, state=state, skip_if_finished=True)

    def _feasible(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [t for t in trials if self._is_whole(t) and all(v <= 0.0 for v in t.constraints.values())]

    def _is_whole(self, trial: FrozenTrial) -> bool:
        return bool(trial.params.keys() >= self.axes.distributions().keys())

    def _put_back_stale(self) -> None:
        if isinstance(self._storage, RDBStorage):
            with quiet():
                fail_stale_trials(self._study)


class _Heartbeat:
    """Tells the database on a timer that a trial is alive."""

    def __init__(self, storage: RDBStorage, trial_id: int) -> None:
        self._storage, self._trial_id = storage, trial_id
        self._over = threading.Event()
        self._every_s = float(storage.get_heartbeat_interval() or HEARTBEAT_S)
        storage.record_heartbeat(trial_id)
        self._thread = threading.Thread(target=self._beat, name="study-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        while not self._over.wait(self._every_s):
            # A database that is away for a moment costs a beat, not the trial.
            with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
                self._storage.record_heartbeat(self._trial_id)


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    with quiet():
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True)


def _numbers(axis: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis)
