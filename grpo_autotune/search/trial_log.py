"""The trials of one search: each is numbered, kept within time, shown while it runs, and entered in the table.

All of it can be built again from the files of the folder, in the order in which it was measured.
"""

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.files import write_whole
from grpo_autotune.hardware import Machine
from grpo_autotune.hardware.places import Place
from grpo_autotune.knobs import Knobs
from grpo_autotune.records.probe import OtherLoad, cycle_means
from grpo_autotune.records.search import SearchProgress, Skipped, TrialRow
from grpo_autotune.records.trial import Progress, Purpose, TrialOutcome, TrialSpec
from grpo_autotune.search.budget import Budget, Costs
from grpo_autotune.search.folder import SearchFolder, State

Trial = Generator[None, None, TrialOutcome]

LOOK_S = 0.02
HANG_S = 120.0
"""Longest silence of a single process; ranks wait for each other, and a collective has a limit of its own
(`trials.child.collectives`)."""


class TrialRunner(Protocol):
    """Runner of trials in child processes (`grpo_autotune.trials.parent.runner.Runner`)."""

    @property
    def has_pair(self) -> bool: ...
    def run(self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None) -> TrialOutcome: ...
    def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]: ...
    def close(self) -> None: ...


class PinnedRunner(Protocol):
    """Runner of the trials of one of several workers: what it starts is resumed until it returns the outcome."""

    @property
    def is_loading(self) -> bool: ...
    def prepare(self) -> None: ...
    def start(self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None) -> Trial: ...
    def close(self) -> None: ...


class View(Protocol):
    """Receiver of a search's progress."""

    def show(self, state: SearchProgress) -> None: ...


@dataclass(frozen=True)
class Task:
    """Subject and place of a search."""

    config: RunConfig  # the user's; for a script a stand-in
    machine: Machine
    folder: SearchFolder
    fingerprint: str  # of the configuration and the script
    script: list[str] | None = None  # a script and its arguments, in place of the configuration's own training
    out: Path | None = None  # path of a copy of `tuned.yaml`
    places: tuple[Place, ...] = ()  # parts of the machine for workers that measure beside each other; none for one


class TrialLog:
    """Numbers, runs and records trials."""

    def __init__(
        self,
        task: Task,
        runner: TrialRunner,
        budget: Budget,
        view: View,
        workers: Mapping[str, PinnedRunner] | None = None,  # by the names of the task's places
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.task, self.budget, self._wait = task, budget, wait
        self._runner, self._view, self._workers = runner, view, dict(workers or {})
        self.said: list[str] = []  # what befell workers, a sentence each
        self.costs = Costs(warm=task.script is None)
        self.rows: list[TrialRow] = []
        self.skipped: list[Skipped] = []  # combinations that are not run, and why
        self.others: list[OtherLoad] = []  # load by other processes in each trial but races, where several take turns
        self.notes: set[str] = set()  # shortcomings that trials reported
        self.memory_bytes: int | None = None  # that a trial may take; None where it is unknown

    def spec(self, purpose: Purpose, config: RunConfig, knobs: Knobs, limit_s: float, **more: Any) -> TrialSpec:
        cores = next((place.cores for place in self.task.places if place.name == more.get("place")), ())
        return TrialSpec(
            cores=cores if config.batch.processes == 1 and self.task.script is None else (),
            number=self.task.folder.next_number(),
            purpose=purpose,
            config=plain(config),
            knobs=knobs,
            limit_s=max(1.0, limit_s),
            hang_s=min(HANG_S, max(5.0, limit_s)) if config.batch.processes == 1 else max(1.0, limit_s),
            script=self.task.script,
            world_size=config.batch.processes,
            **more,
        )

    @property
    def has_pair(self) -> bool:
        """True while both processes of the last race are there for the next."""
        return self._runner.has_pair

    def prepare(self, spec: TrialSpec) -> None:
        """Have the processes of all workers load their libraries at the same time, before anything is measured; one of
        them runs what runs alone. One that loads for longer than `HANG_S` is left to its first trial."""
        runners = self._workers.values()
        if not runners or spec.script is not None or spec.world_size > 1:  # a process for each trial
            return
        self._show(self.progress(spec))
        for runner in runners:
            runner.prepare()
        end_s = self.budget.elapsed_s + min(HANG_S, self.budget.left_s)
        while sum(runner.is_loading for runner in runners) and self.budget.elapsed_s < end_s:
            self._wait(LOOK_S)

    def progress(self, spec: TrialSpec) -> SearchProgress:
        """State of the search at the start of a trial."""
        done = len(self.rows)
        return SearchProgress(self.budget.left_s, self.budget.total_s, spec, done, self.skipped, said=self.said)

    def run(
        self, spec: TrialSpec, state: SearchProgress, watch: Callable[[Progress], None] = lambda progress: None
    ) -> TrialOutcome:
        """Run one trial; the view is shown `state`, and it and `watch` each progress of the trial."""
        self._show(state)

        def report(progress: Progress) -> None:
            watch(progress)
            self._show(state, progress)

        outcome = self._runner.run(spec, report)
        self.save_state()
        return outcome

    def start(self, spec: TrialSpec, state: SearchProgress) -> Trial:
        """The same of a trial on a place, to be resumed beside others; of one on none it is run at once."""
        if spec.place is None:
            return self.run(spec, state)
        self._show(state)
        outcome = yield from self._workers[spec.place].start(spec, partial(self._show, state))
        self.save_state()
        return outcome

    def _show(self, state: SearchProgress, progress: Progress | None = None) -> None:
        self._view.show(state._replace(left_s=self.budget.left_s, done=len(self.rows), progress=progress))

    def race(
        self, specs: Sequence[TrialSpec], state: SearchProgress, *, rounds: int, deadline_s: float
    ) -> list[TrialOutcome]:
        self._show(state)
        outcomes = self._runner.race(specs, rounds=rounds, deadline_s=deadline_s)
        self.save_state()
        return outcomes

    def record(
        self,
        spec: TrialSpec,
        outcome: TrialOutcome,
        knobs: Knobs,
        predicted_s: float | None = None,
        useful: float | None = None,
    ) -> None:
        """Enter a trial in the table, with its predicted seconds per step, and with its score where the useful
        completions per step are given."""
        self.notes |= set(outcome.notes)
        self.limit_memory(outcome.most_bytes)
        others = None if outcome.record is None else outcome.record.others
        if others is not None and spec.source != "race" and spec.place is None:
            self.others.append(others)
        cycle = outcome.record.timings.cycle if outcome.record and spec.source != "race" else 1
        step_s = statistics.median(cycle_means(outcome.step_s, cycle)) if outcome.step_s else None
        row = TrialRow(
            number=spec.number,
            purpose=spec.purpose,
            knobs=knobs,
            status=outcome.status,
            step_s=step_s,
            predicted_s=predicted_s,
            peak_bytes=outcome.peak_bytes,
            why=f"{outcome.why}; less memory, as exact: {outcome.rung}" if outcome.rung else outcome.why,
            score=None if useful is None or step_s is None else useful / step_s,
            elapsed_s=outcome.elapsed_s,
            warm=outcome.warm,
            source=spec.source,
            place=spec.place,
        )
        self.rows.append(row)

    def limit_memory(self, most_bytes: int | None) -> None:
        """Lower the memory limit. A limit on one trial's process holds for the others, too; the room that heap and
        threads take of it differs from one to the next, so that the lowest counts."""
        bounds = [bytes_ for bytes_ in (self.memory_bytes, most_bytes) if bytes_ is not None]
        self.memory_bytes = min(bounds, default=None)

    def save_state(self, *, finished: bool = False) -> None:
        spent = {"budget_s": self.budget.total_s, "elapsed_s": self.budget.elapsed_s}
        state = State(fingerprint=self.task.fingerprint, **spent, finished=finished)
        write_whole(self.task.folder.state_file, state.model_dump_json(indent=2) + "\n")

    def rest(self) -> None:
        """End the workers' processes but the one that runs trials alone, which do from here on."""
        alone: object = self._runner
        for runner in self._workers.values():
            if runner is not alone:
                runner.close()

    def close(self) -> None:
        self._runner.close()
        self.rest()


def plain(config: RunConfig) -> dict[str, Any]:
    """A configuration for a trial: without the receipt of an earlier search."""
    values = config.to_dict()
    values.pop("receipt", None)
    return values
