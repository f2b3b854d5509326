"""Evaluation of a combination: a trial within its limits, learnt by leaderboard, models and study."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.checkpoints import CheckpointsSection
from grpo_autotune.knobs import Knobs, knobs_of
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import masked_share
from grpo_autotune.predict.workload import quantiles
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.search import SearchProgress
from grpo_autotune.records.trial import Purpose, TrialOutcome, TrialSpec
from grpo_autotune.scripts.stand_in import overrides
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.comparable import faster, without_evaluations
from grpo_autotune.search.leaderboard import Entry, Leaderboard
from grpo_autotune.search.study import Claim, Study, name_of
from grpo_autotune.search.trial_log import Trial, TrialLog
from grpo_autotune.units import GIB

LEAST_LIMIT_S = 60.0
PATIENCE = 3.0
"""A trial is stopped after this many times its expected seconds."""
ENGINE_S = 300.0
"""Longer for a trial that may have to start vLLM: no other trial tells how long that takes."""
CHEAP = 0.3
MOST_STEPS = 10
NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
"""`GRPOConfig` keys of trials: the probe has measured evaluations, and checkpoints are never written."""
LENGTHS = 200
"""Completion lengths handed to a trial: quantiles of the probe's."""


@dataclass(frozen=True)
class Order:
    """A timed trial as it is given out."""

    spec: TrialSpec
    claim: Claim | None = None  # on the combination, in the study
    cut_short: bool = False  # True where less time is left than the trial would be given


class Evaluator:
    """Evaluates combinations after the probe: every trial gives new models and an entry of the leaderboard."""

    def __init__(self, log: TrialLog, board: Leaderboard, models: Models, study: Study, probe: TrialOutcome) -> None:
        self.log, self.board, self.models, self.study = log, board, models, study
        self.budget, self.costs, self.machine = log.budget, log.costs, log.task.machine
        self._probe, self._lengths = probe, completion_lengths(board.record)
        self.undecided: dict[tuple[str, str], list[tuple[float, float]]] = {}  # rounds of two that tell nothing yet
        self._uneven: dict[str, tuple[Entry, TrialOutcome]] = {}  # measured, and no step told how long training takes

    @property
    def repeats_probe(self) -> bool:
        """True where trials can repeat the lengths of the probe's completions."""
        return bool(self._probe.lengths)

    def expected_s(self, knobs: Knobs) -> float:
        step_s = self.models.step_s(self.board.config_of(knobs)).value
        return self.costs.trial_s(step_s, self.steps(step_s))

    def affords(self, knobs: Knobs, room_s: float, place: str | None = None) -> bool:
        """True where a timed trial surely fits into `room_s` seconds, alone or on a place."""
        return SURE * self.slower(place) * self.expected_s(knobs) <= room_s

    def steps(self, step_s: float) -> int:
        """Steps to measure: those of `search.steps`, and more while they are cheap beside starting the trial."""
        cheap = int(CHEAP * self.costs.beside_s / max(step_s, 1e-3))
        return max(self.board.config.search.steps, min(MOST_STEPS, cheap))

    def spec(self, purpose: Purpose, knobs: Knobs, limit_s: float, **more: Any) -> TrialSpec:
        """A trial of the user's configuration with these knobs; for a script, all keys that follow from them."""
        config = self.board.config_of({**self.board.baseline_knobs, **knobs})
        if self.log.task.script is not None:
            knobs = overrides(self.board.config, config)
        if purpose == "timed":
            more |= {"completion_lengths": self._lengths, "seen_lengths": self._probe.lengths}
        if config.batch.eval_batch is not None:
            keys = {"grpo": config.grpo | NO_EVALUATION, "checkpoints": CheckpointsSection()}
            config = config.model_copy(update=keys)
        return self.log.spec(purpose, config, knobs, limit_s, **more)

    def run(self, purpose: Purpose, knobs: Knobs, limit_s: float, **more: Any) -> TrialOutcome:
        """Run a trial that is not timed, and record it."""
        spec = self.spec(purpose, knobs, limit_s, **more)
        outcome = self.log.run(spec, self._progress(spec))
        self.record(spec, outcome)
        return outcome

    def race(self, lanes: Sequence[Knobs], rounds: int, limit_s: float) -> list[TrialOutcome]:
        """Run so many rounds of several combinations interleaved, and record all."""
        first = self.log.task.folder.next_number()
        specs = [
            self.spec("timed", knobs, limit_s, steps=1, source="race").model_copy(update={"number": number})
            for number, knobs in enumerate(lanes, first)
        ]
        outcomes = self.log.race(specs, self._progress(specs[1]), rounds=rounds, deadline_s=limit_s)
        sides = list(zip(lanes, outcomes, strict=True))
        for knobs, outcome in sides:
            self.board.rows.learn(knobs, outcome)
        even = [at_expected(self.board, knobs, outcome) for knobs, outcome in sides]
        self.even_out()
        for spec, outcome in zip(specs, even, strict=True):
            self.record(spec, outcome)
        return even

    def enter(self, knobs: Knobs, outcome: TrialOutcome) -> None:
        """Enter a combination that only a race has measured; the user's has its trial."""
        if self.board.entry(knobs) is None and name_of(knobs) != name_of(self.board.baseline_knobs):
            self.board.add(knobs, outcome, None)

    def timed(self, knobs: Knobs, source: str, room_s: float, claim: Claim | None = None) -> Entry | None:
        """Measure a combination alone in at most `room_s` seconds; None where it did not end well."""
        order = self.order(knobs, source, room_s, claim)
        try:
            outcome = self.log.run(order.spec, self._progress(order.spec))
        except KeyboardInterrupt:
            self.give_up(order)
            raise
        return self.take(order, outcome)

    def is_decided(self, one: Entry, other: Entry) -> bool:
        """True of two whose race needs no more rounds."""
        names = name_of(one.knobs), name_of(other.knobs)
        return self.board.pair(one, other) is not None and not {names, names[::-1]} & self.undecided.keys()

    def alone(self, entry: Entry, room_s: float) -> Entry:
        """An entry that was measured beside others once more alone, where `room_s` seconds hold that."""
        tried = any(row.source == "alone" and name_of(row.knobs) == name_of(entry.knobs) for row in self.log.rows)
        if is_alone(entry) or tried or not self.affords(entry.knobs, room_s):
            return entry
        return self.timed(entry.knobs, "alone", room_s) or entry

    def order(
        self, knobs: Knobs, source: str, room_s: float, claim: Claim | None = None, place: str | None = None
    ) -> Order:
        """The trial that measures a combination in at most `room_s` seconds, on a place beside others or alone."""
        config = self.board.config_of(knobs)
        expected_s = self.slower(place) * self.expected_s(knobs)
        limit_s = self.board.config.search.trial_limit_s or patience_s(expected_s, config)
        steps = self.steps(self.models.step_s(config).value)
        spec = self.spec("timed", knobs, min(limit_s, room_s), source=source, steps=steps, place=place)
        return Order(spec, claim, cut_short=room_s < limit_s)

    def start(self, order: Order) -> Trial:
        return self.log.start(order.spec, self._progress(order.spec))

    def take(self, order: Order, outcome: TrialOutcome) -> Entry | None:
        """Learn from a timed trial, and tell the study."""
        entry = self.learn(order.spec, outcome)
        if order.claim is not None:
            self._tell(order.claim, outcome, entry, cut_short=order.cut_short)
        return entry

    def give_up(self, order: Order) -> None:
        """Give a combination back whose trial was interrupted."""
        if order.claim is not None:
            self.study.fail(order.claim, "stopped by Ctrl-C", order.spec.number)

    def slower(self, place: str | None) -> float:
        """Seconds of the user's configuration on a place beside other workers, over those alone: by its last
        measurement there; before any, by the place's share of the machine."""
        pace = self.board.paces.get(place or "")
        return 1.0 / self.share(place) if pace is None else pace.at(math.inf)

    def share(self, place: str | None) -> float:
        """Part that a place has of the cores and the memory of a trial that runs alone."""
        return next((one.share for one in self.log.task.places if one.name == place), 1.0)

    def adopt_probe(self, claim: Claim | None) -> None:
        entry = self.board.add(self.board.baseline_knobs, self._probe, None)
        if claim is not None:
            self._tell(claim, self._probe, entry, cut_short=False)

    def learn(self, spec: TrialSpec, outcome: TrialOutcome) -> Entry | None:
        """Take a timed trial into account."""
        outcome = without_evaluations(outcome)
        knobs = self.knobs_of(spec)
        config = self.board.config_of(knobs)
        predicted_s, entry = self.models.step_s(config).value, None
        measured = outcome.status == "ok" and bool(outcome.step_s)
        if measured and spec.place is not None and name_of(knobs) == name_of(self.board.baseline_knobs):
            self.board.see_place(spec.place, at_expected(self.board, knobs, outcome))
        slower = self.slower(spec.place)
        raw = faster(outcome, slower)
        self.costs.learn(raw.model_copy(update={"elapsed_s": outcome.elapsed_s / slower}))
        outcome = evened(self.board, knobs, raw)
        self.even_out()
        if measured:
            entry = self.board.add(knobs, outcome, predicted_s, spec.place)
            if outcome is raw and raw.living_shares and entry is not self.board.baseline:
                self._uneven[name_of(knobs)] = entry, raw
        self.models = self.models.learn(config, outcome)
        self.log.record(spec, outcome, knobs, predicted_s, self.board.useful(config) if entry is not None else None)
        return entry

    def even_out(self) -> None:
        """Enter anew, at the expected share, what was measured before any step told how long training takes."""
        board = self.board
        for name, (entry, raw) in list(self._uneven.items()):
            if (even := at_expected(board, entry.knobs, raw)) is raw:
                continue
            del self._uneven[name]
            if (now := board.entries[name]).step == entry.step and now.race is None:
                del board.entries[name]
                again = board.add(entry.knobs, even, entry.predicted_s, entry.place)
                board.update(again, worst_case=now.worst_case, fails=now.fails, peak_bytes=now.peak_bytes)

    def relearn(self, spec: TrialSpec, outcome: TrialOutcome) -> None:
        """Take a trial of an earlier process into account, and tell it to a journal that lost it."""
        if spec.purpose != "timed":
            self.record(spec, outcome)
            self.costs.learn(outcome)
            return
        self.learn(spec, outcome)
        if spec.number not in self.study.numbers():
            knobs = self.knobs_of(spec)
            claim = self.study.ask(knobs)
            self._tell(claim, outcome, self.board.entry(knobs), cut_short=outcome.status == "timeout")

    def record(self, spec: TrialSpec, outcome: TrialOutcome) -> None:
        """Enter a trial in the table and nowhere else."""
        self.log.record(spec, outcome, self.knobs_of(spec))

    def knobs_of(self, spec: TrialSpec) -> Knobs:
        if spec.script is None or spec.purpose in ("probe", "rewards"):
            return spec.knobs
        config = RunConfig.from_dict({"speedups": "none", **spec.config})  # a stored trial may leave the key out
        return knobs_of(config, self.board.baseline_knobs)

    def _progress(self, spec: TrialSpec) -> SearchProgress:
        board, step_error = self.board, self.models.errors().get("step")
        baseline = board.baseline_knobs
        state = self.log.progress(spec)._replace(
            changed=board.changed({**baseline, **self.knobs_of(spec)}),
            baseline=baseline,
            step_error=None if step_error is None else step_error["median"],
        )
        if not board.has_baseline:
            return state
        best = board.ranking("fast")[0]
        return state._replace(
            baseline_step_s=board.baseline.step.value,
            best_step_s=best.step.value,
            best_changed=board.changed(best.knobs),
            speedup=board.speedup(best).value,
        )

    def _tell(self, claim: Claim, outcome: TrialOutcome, entry: Entry | None, *, cut_short: bool) -> None:
        attributes = {"status": outcome.status, "why": outcome.why, "machine": self.machine.fingerprint}
        if entry is not None and outcome.status == "ok":
            score = self.board.score(entry.config, entry.step.value)
            limit, peak = self.log.memory_bytes, outcome.peak_bytes
            headroom = (limit - peak) / GIB if limit is not None and peak is not None else 0.0
            step = {"step_s": entry.step.value, "peak_bytes": outcome.peak_bytes}
            self.study.tell(claim, score, outcome.number, {**attributes, **step}, headroom)
        elif outcome.status == "oom":
            over = max(0.001, (outcome.overshoot_bytes or 0) / GIB)
            self.study.tell_infeasible(claim, outcome.number, attributes, over_gib=over)
        elif outcome.status == "timeout" and not cut_short:
            self.study.tell_infeasible(claim, outcome.number, attributes, over_time=1.0)
        else:
            self.study.fail(claim, outcome.why or outcome.status, outcome.number)


def is_alone(entry: Entry | None) -> bool:
    """True of an entry that was measured beside no other worker's trials, or raced."""
    return entry is not None and (entry.place is None or entry.race is not None)


def evened(board: Leaderboard, knobs: Knobs, outcome: TrialOutcome) -> TrialOutcome:
    """An outcome as if each step had trained on the share of its completions that is expected; what it shows of the
    seconds that this takes is learnt first."""
    board.rows.learn(knobs, outcome)
    return at_expected(board, knobs, outcome)


def at_expected(board: Leaderboard, knobs: Knobs, outcome: TrialOutcome) -> TrialOutcome:
    """The same by what was learnt before."""
    share = expected_share(board, board.config_of(knobs))
    return outcome if share is None else board.rows.at(share, knobs, outcome)


def expected_share(board: Leaderboard, config: RunConfig) -> float | None:
    """Share of completions in groups with a spread of rewards, and not masked; None where no spread was seen."""
    if board.living is None:
        return None
    truncated = board.record.tokens.truncated_share if board.record.tokens else 0.0
    return board.living.share(config.batch.num_generations) * (1.0 - masked_share(config, truncated))


def patience_s(expected_s: float, config: RunConfig) -> float:
    """Seconds after which a timed trial is given up."""
    starts = config.use_vllm and (not config.vllm.at_server or config.vllm.server_gpus is not None)
    return max(LEAST_LIMIT_S, PATIENCE * expected_s) + (ENGINE_S if starts else 0.0)


def completion_lengths(record: ProbeRecord) -> list[int] | None:
    """Lengths in tokens distributed as the probe's completions: quantiles of the line through its percentiles."""
    if record.tokens is None:
        return None
    spread = record.tokens.completion
    lengths = np.rint(quantiles(spread, (np.arange(LENGTHS) + 0.5) / LENGTHS))
    return [int(length) for length in np.clip(lengths, 1, max(1, round(spread.max)))]
