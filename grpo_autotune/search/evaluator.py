"""Where trials are run and written down: it numbers them, bounds their time, learns from them, and loses none.

Everything it holds can be built again from the files of the folder (`recall`), in the order in which it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import Knobs, knobs_of
from grpo_autotune.predict.workload import quantiles
from grpo_autotune.records.probe import ProbeRecord, cycle_means
from grpo_autotune.records.search import Skipped, TrialRow
from grpo_autotune.records.trial import Progress, Purpose, TrialOutcome, TrialSpec
from grpo_autotune.scripts.stand_in import overrides
from grpo_autotune.search.acquisition import Models
from grpo_autotune.search.budget import Budget, Costs
from grpo_autotune.search.folder import SearchFolder, State
from grpo_autotune.search.leaderboard import Book, Entry
from grpo_autotune.search.study import Asked, Study, name_of

GIB = 2**30
LEAST_LIMIT_S = 60.0
PATIENCE = 3.0
"""A trial is stopped after this many times what it was expected to take."""
SERVER_S = 300.0
"""Longer for a trial that may have to start a vLLM server: no other trial tells how long that takes."""
HANG_S = 120.0
CHEAP = 0.3
MOST_STEPS = 10
LENGTHS = 200
"""Completion lengths handed to a trial: quantiles of what the probe saw."""


class Trials(Protocol):
    """What runs trials (`grpo_autotune.trials.parent.runner.Runner`)."""

    def run(self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None) -> TrialOutcome: ...
    def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]: ...
    def close(self) -> None: ...


class Standing(NamedTuple):
    """What there is to see while a search runs."""

    left_s: float
    total_s: float
    trial: TrialSpec | None
    progress: Progress | None
    changed: Knobs
    done: int
    own: Entry | None
    best: Entry | None
    speedup: float
    skipped: list[Skipped]
    errors: dict[str, dict[str, float]]


class View(Protocol):
    """Who is told how a search goes."""

    def say(self, line: str) -> None: ...
    def show(self, standing: Standing) -> None: ...


@dataclass
class Lab:
    """One search's trials.

    Attributes:
        config: The user's configuration.
        memory_bytes: What a trial may take; null where that is unknown.
        notes: What trials could not do as asked.
        lengths: Completion lengths of timed trials.
        seen_lengths: Those of the probe, which come first.
        script: A script and its arguments, in place of the configuration's own training.
        out: Where `tuned.yaml` is copied.
    """

    config: RunConfig
    machine: Machine
    folder: SearchFolder
    runner: Trials
    budget: Budget
    view: View
    fingerprint: str
    script: list[str] | None = None
    out: Path | None = None
    costs: Costs = field(default_factory=Costs)
    rows: list[TrialRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    lengths: list[int] | None = None
    seen_lengths: list[list[int]] = field(default_factory=list)
    memory_bytes: int | None = None
    _book: Book | None = None
    _models: Models | None = None
    _study: Study | None = None
    _probe: TrialOutcome | None = None

    @property
    def book(self) -> Book:
        """What is known; there from the probe on."""
        assert self._book is not None
        return self._book

    @property
    def models(self) -> Models:
        """Fitted to everything so far; there from the probe on."""
        assert self._models is not None
        return self._models

    @property
    def study(self) -> Study:
        """The Optuna study; there from the probe on."""
        assert self._study is not None
        return self._study

    def begin(self, book: Book, models: Models, study: Study, probe: TrialOutcome) -> None:
        """Take over what the probe made possible."""
        self._book, self._models, self._study, self._probe = book, models, study, probe
        self.lengths, self.seen_lengths = completion_lengths(book.record), probe.lengths

    def spec(self, purpose: Purpose, config: RunConfig, knobs: Knobs, limit_s: float, **more: Any) -> TrialSpec:
        """A trial with the next free number."""
        return TrialSpec(
            number=self.folder.next_number(),
            purpose=purpose,
            config=plain(config),
            knobs=knobs if self.script is None else overrides(self.config, config),
            limit_s=max(1.0, limit_s),
            hang_s=min(HANG_S, max(5.0, limit_s)),
            script=self.script,
            world_size=config.batch.processes,
            completion_lengths=self.lengths if purpose == "timed" else None,
            seen_lengths=self.seen_lengths if purpose == "timed" else [],
            **more,
        )

    def run(self, spec: TrialSpec, watch: Callable[[Progress], None] = lambda progress: None) -> TrialOutcome:
        """Run one trial; the view and `watch` are told what it does."""
        self.show(spec)

        def told(progress: Progress) -> None:
            watch(progress)
            self.show(spec, progress)

        outcome = self.runner.run(spec, told)
        self.remember()
        return outcome

    def heed(self, outcome: TrialOutcome) -> None:
        """A limit that a trial's process was under bounds the others, too; what heap and threads take of it differs
        from one to the next, so that the lowest counts."""
        bounds = [bytes_ for bytes_ in (self.memory_bytes, outcome.most_bytes) if bytes_ is not None]
        self.memory_bytes = min(bounds, default=None)

    def knobs_of(self, spec: TrialSpec) -> Knobs:
        """The combination that a trial is of; a script is told of keys that follow from it, too."""
        if spec.script is None or self._book is None or spec.purpose in ("probe", "rewards"):
            return spec.knobs
        return knobs_of(RunConfig.from_dict(spec.config), self.book.own)

    def expected_s(self, knobs: Knobs) -> float:
        """What a timed trial of these knobs is expected to take."""
        step_s = self.models.step_s(self.book.config_of(knobs)).value
        return self.costs.trial_s(step_s, self.steps(step_s))

    def patience_s(self, knobs: Knobs, config: RunConfig) -> float:
        """Seconds after which a timed trial of these knobs is given up."""
        server_s = 0.0 if config.vllm.server_gpus is None else SERVER_S
        return max(LEAST_LIMIT_S, PATIENCE * self.expected_s(knobs)) + server_s

    def steps(self, step_s: float) -> int:
        """Steps to measure: those of `search.steps`, and more while they are cheap beside starting the trial."""
        cheap = int(CHEAP * self.costs.beside_s / max(step_s, 1e-3))
        return max(self.config.search.steps, min(MOST_STEPS, cheap))

    def timed(self, knobs: Knobs, source: str, room_s: float, asked: Asked | None = None) -> Entry | None:
        """Measure a combination in at most `room_s` seconds; null where it did not end well."""
        config = self.book.config_of(knobs)
        own_limit = self.config.search.trial_limit_s or self.patience_s(knobs, config)
        steps = self.steps(self.models.step_s(config).value)
        spec = self.spec("timed", config, knobs, min(own_limit, room_s), source=source, steps=steps)
        try:
            outcome = self.run(spec)
        except KeyboardInterrupt:
            if asked is not None:
                self.study.fail(asked, "stopped by Ctrl-C", spec.number)
            raise
        entry = self.learn(spec, outcome)
        if asked is not None:
            self._tell(asked, outcome, entry, cut_short=room_s < own_limit)
        return entry

    def adopt(self, asked: Asked | None) -> None:
        """Take the probe as the trial of the user's configuration."""
        assert self._probe is not None
        entry = self.book.add(self.book.own, self._probe, None)
        if asked is not None:
            self._tell(asked, self._probe, entry, cut_short=False)

    def learn(self, spec: TrialSpec, outcome: TrialOutcome) -> Entry | None:
        """Take a timed trial into account, a recalled one too."""
        knobs = self.knobs_of(spec)
        config = self.book.config_of(knobs)
        predicted = self.models.step_s(config).value
        entry = None
        if outcome.status == "ok" and outcome.step_s:
            entry = self.book.add(knobs, outcome, predicted)
        self._models = self.models.learn(config, outcome)
        self.costs.learn(outcome)
        self.write(spec, outcome, predicted, entry)
        return entry

    def write(
        self, spec: TrialSpec, outcome: TrialOutcome, predicted_s: float | None = None, entry: Entry | None = None
    ) -> None:
        """One line of the table of trials."""
        self.notes |= set(outcome.notes)
        self.heed(outcome)
        cycle = outcome.record.timings.cycle if outcome.record and spec.source != "race" else 1
        step_s = statistics.median(cycle_means(outcome.step_s, cycle)) if outcome.step_s else None
        self.rows.append(
            TrialRow(
                number=spec.number,
                purpose=spec.purpose,
                knobs=self.knobs_of(spec),
                status=outcome.status,
                step_s=step_s,
                predicted_s=predicted_s,
                peak_bytes=outcome.peak_bytes,
                why=outcome.why,
                score=None if entry is None or step_s is None else self.book.score(entry.config, step_s),
                elapsed_s=outcome.elapsed_s,
                warm=outcome.warm,
                source=spec.source,
            )
        )

    def tell_again(self, spec: TrialSpec, outcome: TrialOutcome) -> None:
        """Tell a journal what it lost of a trial that has an outcome."""
        if spec.number not in self.study.numbers():
            knobs = self.knobs_of(spec)
            entry = self.book.entries.get(name_of(knobs))
            self._tell(self.study.ask(knobs), outcome, entry, cut_short=outcome.status == "timeout")

    def remember(self, *, finished: bool = False) -> None:
        """Write down how far the search is."""
        self.folder.save_state(
            State(
                fingerprint=self.fingerprint,
                budget_s=self.budget.total_s,
                elapsed_s=self.budget.elapsed_s,
                finished=finished,
            )
        )

    def show(self, spec: TrialSpec | None = None, progress: Progress | None = None) -> None:
        """Let the view know where things stand."""
        book = self._book
        entries = [] if book is None or name_of(book.own) not in book.entries else book.ranking("fast")
        self.view.show(
            Standing(
                left_s=self.budget.left_s,
                total_s=self.budget.total_s,
                trial=spec,
                progress=progress,
                changed={} if book is None or spec is None else book.changed({**book.own, **self.knobs_of(spec)}),
                done=len(self.rows),
                own=book.baseline if book is not None and entries else None,
                best=entries[0] if entries else None,
                speedup=book.speedup(entries[0]).value if book is not None and entries else 1.0,
                skipped=self.skipped,
                errors=self._models.errors() if self._models is not None else {},
            )
        )

    def _tell(self, asked: Asked, outcome: TrialOutcome, entry: Entry | None, *, cut_short: bool) -> None:
        facts = {"status": outcome.status, "why": outcome.why, "machine": self.machine.fingerprint}
        if entry is not None and outcome.status == "ok":
            score = self.book.score(entry.config, entry.step.value)
            limit, peak = self.memory_bytes, outcome.peak_bytes
            headroom = (limit - peak) / GIB if limit is not None and peak is not None else 0.0
            step = {"step_s": entry.step.value, "peak_bytes": outcome.peak_bytes}
            self.study.tell(asked, score, outcome.number, {**facts, **step}, headroom)
        elif outcome.status == "oom":
            over = max(0.001, (outcome.overshoot_bytes or 0) / GIB)
            self.study.tell_infeasible(asked, outcome.number, facts, over_gib=over)
        elif outcome.status == "timeout" and not cut_short:
            self.study.tell_infeasible(asked, outcome.number, facts, over_time=1.0)
        else:
            self.study.fail(asked, outcome.why or outcome.status, outcome.number)


def plain(config: RunConfig) -> dict[str, Any]:
    """A configuration for a trial: without the receipt of what it was before."""
    values = config.to_dict()
    values.pop("receipt", None)
    return values


def completion_lengths(record: ProbeRecord, count: int = LENGTHS) -> list[int] | None:
    """Lengths distributed as the probe's completions were: `count` quantiles of the line through its percentiles."""
    if record.tokens is None:
        return None
    lengths = record.tokens.completion
    longest = max(1, round(lengths.max))
    return [min(longest, max(1, round(n))) for n in quantiles(lengths, (np.arange(count) + 0.5) / count)]
