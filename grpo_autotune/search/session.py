"""The search: the user's configuration first, then what promises most, under a budget that is kept to the second.

    probe -> [models' best guess | sampler's] ... -> rewards -> worst case -> race -> reverts

Best-so-far files are written after every trial. Every step can be taken up again from the files of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.files import write_whole
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.predict.models import Models as FittedModels
from grpo_autotune.records.search import Ended, SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.ablation import measure_reverts
from grpo_autotune.search.acquisition import Proposal, Ranking, rank
from grpo_autotune.search.budget import SURE, Budget, Costs
from grpo_autotune.search.evaluator import Lab, Trials, View, plain
from grpo_autotune.search.final_race import race, race_s
from grpo_autotune.search.folder import SearchFolder
from grpo_autotune.search.guard_trials import (
    Rewards,
    group_s,
    judge_group,
    open_questions,
    stand_worst_case,
    worst_case_s,
)
from grpo_autotune.search.leaderboard import GROUP, Entry, Level
from grpo_autotune.search.start import Fit, measure_own, open_search, recall
from grpo_autotune.search.study import Asked, Sampler, name_of
from grpo_autotune.search.summary import report_of_search
from grpo_autotune.search.tuned_files import emit
from grpo_autotune.units import hms

FAILURES = 4
"""So many failures in a row that no knob explains end a search."""
SAMPLER_TURN = 3
"""Every third proposal is the sampler's."""
SAMPLER: Sampler = "tpe"
FINALISTS = 3
BORROWED = 2
QUESTIONS_AT = 0.4
"""Part of the time for trials after which rewards of the leader's values are compared, so that what is left goes to
values that hold; and how much of the time left each comparison may take."""
QUESTIONS_ROOM = 0.5


@dataclass
class Session:
    """One search, from the lock of its folder to its report.

    Attributes:
        lab: Where its trials are run.
        storage: URL of a shared study; null keeps it in the folder.
        fit: Makes the models of a probe.
        sampler: Of the study.
    """

    lab: Lab
    storage: str | None = None
    fit: Fit = FittedModels.from_probe
    sampler: Sampler = SAMPLER
    ended: Ended = "budget"
    why_ended: str = "the budget is spent"
    turns: int = 0
    failures: list[str] = field(default_factory=list)
    stood: set[str] = field(default_factory=set)

    def run(self, recalled: Sequence[tuple[TrialSpec, TrialOutcome | None]] = ()) -> SearchReport:
        """Search, and leave report and configurations in the folder.

        Raises:
            ConfigError: The budget is too small, the space is empty, or the study is another one's.
            NothingSucceeded: The user's own configuration cannot be measured.
        """
        lab = self.lab
        try:
            self.space, self.pool = open_search(lab, recalled, self.fit, self.storage, self.sampler)
            self.rewards = Rewards(lab)
            if lab.budget.total_s == 0.0:
                self.ended, self.why_ended = "prediction", "--budget 0: nothing but the probe was measured"
                return self._close()
            recall(lab, self.rewards, recalled)
            measure_own(lab)
            self._save_best()
            self._loop()
            self._borrow()
            self._final()
        except KeyboardInterrupt:
            if lab._book is None or name_of(lab.book.own) not in lab.book.entries:
                raise
            self.ended, self.why_ended = "interrupted", "stopped by Ctrl-C"
        finally:
            lab.runner.close()
            if lab._study is not None:
                lab.study.close()
        return self._close()

    def _close(self) -> SearchReport:
        lab = self.lab
        report = report_of_search(lab, self.space, self.pool, self.ended, self.why_ended, self.sampler)
        emit(lab, report)
        write_whole(lab.folder.report, report.model_dump_json(indent=2) + "\n")
        lab.remember(finished=self.ended != "interrupted")
        return report

    # The trials

    def _loop(self) -> None:
        """Measure what promises most until nothing does, or the time for it is over."""
        lab = self.lab
        while True:
            ranking = self._rank()
            self._keep_for_the_end()
            if self._questions() and (not ranking.proposals or self._spent_share() > QUESTIONS_AT):
                self._prove()
                continue
            if not ranking.proposals:
                self.ended, self.why_ended = "exhausted", "nothing that is left can beat the best"
                return
            asked, source = self._next(ranking)
            if asked is None and self._questions():
                self._prove()
                continue
            if asked is None:
                self.why_ended = "no other trial fits into what is left of the budget"
                return
            before = len(lab.rows)
            entry = lab.timed(asked.knobs, source, lab.budget.search_left_s, asked)
            if entry is not None:
                self.failures.clear()
                self.pool.add_neighbours(entry.knobs)
            else:
                self._count_failure(lab.rows[before:])
            self._save_best()
            if self.ended == "failing":
                return

    def _keep_for_the_end(self) -> None:
        """Time for the leader's worst case and race; with nothing to race, a first rival is worth more than that."""
        lab = self.lab
        leader = lab.book.ranking("open")[0]
        rival = leader is not lab.book.baseline
        lab.budget.keep(self._ends_s(leader) + group_s(lab, leader) if rival else 0.0)

    def _ends_s(self, entry: Entry) -> float:
        """What an entry's worst case and race take."""
        return race_s(self.lab, entry.step.value) + worst_case_s(self.lab, entry)

    def _rank(self) -> Ranking:
        lab = self.lab
        taken = lab.study.taken() | set(lab.book.entries) | self._tried()
        left = [knobs for name, knobs in self.pool.points.items() if name not in taken]
        ranking = rank(left, lab.book, lab.models, lab.memory_bytes)
        lab.skipped = ranking.rows()
        return ranking

    def _tried(self) -> set[str]:
        """Combinations that failed here; a failed trial says nothing of others, and is not repeated."""
        return {name_of(row.knobs) for row in self.lab.rows if row.purpose == "timed"}

    def _next(self, ranking: Ranking) -> tuple[Asked | None, str]:
        """The next combination whose trial fits into the time; null where none does."""
        lab = self.lab
        room_s = lab.budget.search_left_s - self._set_aside_s()
        fitting = [p for p in ranking.proposals if self._needs_s(p) <= room_s]
        if not fitting:
            return None, ""
        self.turns += 1
        if self.turns % SAMPLER_TURN == 0:
            asked, source = lab.study.suggest([p.knobs for p in fitting]), "sampler"
        else:
            asked, source = lab.study.ask(fitting[0].knobs), "models"
        by_name = {name_of(p.knobs): p for p in fitting}
        if name_of(asked.knobs) in by_name:
            return asked, source
        if name_of(asked.knobs) in self._tried():  # put back by another machine that had lost it; known here
            lab.study.fail(asked, "known")
            return self._next(ranking)
        return asked, "queue"

    def _needs_s(self, proposal: Proposal) -> float:
        return SURE * self.lab.costs.trial_s(proposal.step_s, self.lab.steps(proposal.step_s))

    def _questions(self) -> list[tuple[str, object]]:
        """Values of the leader's learning knobs that rewards have to judge; what they refuted leads nobody."""
        leaders = self.lab.book.ranking("open")[:1]
        return [question for entry in leaders for question in open_questions(self.lab.book, entry)]

    def _spent_share(self) -> float:
        """Part of the time for trials that is over."""
        budget = self.lab.budget
        return 1.0 - budget.search_left_s / (budget.total_s - budget.end_s)

    def _set_aside_s(self) -> float:
        """Seconds for comparing rewards, where the best so far needs that."""
        return min(0.25 * self.lab.budget.total_s, 2 * self.rewards.cost_s(32)) if self._questions() else 0.0

    def _count_failure(self, rows: Sequence[object]) -> None:
        """End a search whose trials fail one after another for a reason that no knob explains."""
        last = self.lab.rows[-1]
        if not rows or last.status in ("oom", "timeout", "invalid"):
            self.failures.clear()
            return
        self.failures.append(last.status)
        if len(self.failures) >= FAILURES and len(set(self.failures)) == 1:
            self.ended = "failing"
            self.why_ended = f"{len(self.failures)} trials in a row ended with {last.status}: {last.why or 'no reason'}"

    def _save_best(self) -> None:
        report = report_of_search(self.lab, self.space, self.pool, self.ended, "under way", self.sampler)
        emit(self.lab, report)

    def _borrow(self) -> None:
        """Measure here what other machines of a shared study found best."""
        lab = self.lab
        for knobs, _ in lab.study.scores()[:BORROWED] if self.storage else ():
            known = set(lab.book.entries) | self._tried()
            if name_of(knobs) not in known and SURE * lab.expected_s(knobs) <= lab.budget.search_left_s:
                lab.timed(knobs, "shared", lab.budget.search_left_s)

    # The end

    def _prove(self) -> None:
        """Judge the values that the leader waits for, with half the time that is left for trials."""
        lab = self.lab
        for key, value in self._questions():
            lab.book.note(self.rewards.judge(key, value, QUESTIONS_ROOM * lab.budget.search_left_s))
        self._save_best()

    def _final(self) -> None:
        """Worst case and race for the best of each kind, then what each change of the winner brings."""
        lab = self.lab
        self._judge_groups()
        levels: tuple[Level, ...] = ("tuned", "exact", "fast")
        for level in levels:
            # The next best only where the best does not hold.
            any(self._stands(entry) for entry in self._contenders(level))
        self._save_best()
        winner = lab.book.best("tuned")
        if winner is not lab.book.baseline:
            measure_reverts(lab, winner)

    def _judge_groups(self) -> None:
        """Judge the group sizes that `tuned.yaml` waits for, with the time that the race does not need."""
        lab, book = self.lab, self.lab.book
        for entry in book.ranking("open")[:FINALISTS]:
            changed = book.changed(entry.knobs)
            if [key for key, value in changed.items() if book.proof(key, value) == "unproven"] == [GROUP]:
                judge_group(lab, entry, lab.budget.left_s - self._ends_s(entry))

    def _contenders(self, level: Level) -> list[Entry]:
        book = self.lab.book
        found = [entry for entry in book.ranking(level) if entry is not book.baseline]
        return [entry for entry in found if book.speedup(entry).value > 1.0][:FINALISTS]

    def _stands(self, entry: Entry) -> bool:
        """Whether an entry holds in the worst case and in the race; true where there was no time to see."""
        lab, name = self.lab, name_of(entry.knobs)
        if name not in self.stood:
            self.stood.add(name)
            if entry.worst_case == "not run" and stand_worst_case(lab, entry, lab.budget.left_s / 2) is False:
                return False
            race(lab, entry, lab.budget.left_s)
            judge_group(lab, entry, lab.budget.left_s)
        return entry.fails is None and (entry.raced is None or entry.raced.low > 1.0)


def search(
    config: RunConfig,
    *,
    budget_s: float,
    out: Path | None,
    run_dir: Path,
    resume: bool = False,
    storage: str | None = None,
    view: View,
    runner: Callable[[Path], Trials],
    script: list[str] | None = None,
    fit: Fit = FittedModels.from_probe,
    sampler: Sampler = SAMPLER,
    clock: Callable[[], float] = time.monotonic,
    machine: Machine | None = None,
) -> SearchReport:
    """Search for a faster configuration that learns the same.

    Args:
        config: The user's configuration.
        budget_s: Seconds for everything; 0 predicts from a probe alone.
        out: Where `tuned.yaml` is copied, too.
        run_dir: Folder of the search.
        resume: Go on with the search there.
        storage: URL of a study that several machines share.
        view: Told how it goes.
        runner: Makes what runs trials in a folder.
        script: A script and its arguments, whose `GRPOConfig` is searched instead.
        fit: Makes the models of a probe.
        sampler: Of the study.
        clock: Seconds, monotonic.
        machine: What is there; looked at by default.

    Raises:
        ConfigError: The folder is in use or finished, the budget too small, the space empty, the study another one's.
        EnvironmentProblem: The disk is full, or the database's driver is missing.
        NothingSucceeded: The user's own configuration cannot be measured.
    """
    folder, machine = SearchFolder(run_dir), machine or detect()
    begun = clock()
    with folder.locked():
        fingerprint = fingerprint_of(config, script)
        state = folder.check(fingerprint, resume=resume)
        write_whole(folder.config, config.to_yaml())
        write_whole(folder.machine, machine.model_dump_json(indent=2) + "\n")
        budget = Budget(budget_s, state.elapsed_s if state else 0.0, clock, begun)
        if budget_s and budget.left_s <= 0.0:
            raise ConfigError(
                f"this search has spent {hms(budget.elapsed_s)} already",
                where="--budget",
                fix="Give a larger one; the time spent counts.",
            )
        lab = Lab(config, machine, folder, runner(run_dir), budget, view, fingerprint, script, out)
        lab.costs = Costs(warm=script is None)
        with _disk_full_said(run_dir):
            return Session(lab, storage, fit, sampler).run(folder.trials() if state else ())


def fingerprint_of(config: RunConfig, script: list[str] | None) -> str:
    """Of what a study is about: everything but where files go and how long the search may take."""
    values = plain(config)
    values.pop("output", None)
    values["search"] = {key: value for key, value in values.get("search", {}).items() if key in ("knobs", "steps")}
    return hashlib.sha256(json.dumps([values, script], sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _disk_full_said(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentProblem(
            "the disk is full", where=str(folder), fix="Make room and go on with --resume; what was measured is kept."
        ) from error
