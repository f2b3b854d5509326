"""The search: the user's configuration first, then the most promising ones, under a budget that is kept to the second.

    probe -> [models' best guess | sampler's] ... -> rewards -> race and worst case -> ablation

Whatever takes the lead after a race has a worst case and a race of its own (`ending`). Best-so-far files are written
after every trial. Every step can be taken up again from the files of the folder.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.hardware.places import Place
from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.models import Models
from grpo_autotune.processes.ending import signal_of
from grpo_autotune.records.search import Ended, SearchReport
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.acquisition import Pool, Ranking, rank
from grpo_autotune.search.budget import MOST_END_SHARE, SURE, Budget
from grpo_autotune.search.crew import Crew
from grpo_autotune.search.ending import Ending, contenders, end_s
from grpo_autotune.search.evaluator import Evaluator, Order
from grpo_autotune.search.final_race import FIRST_ROUNDS, LEAST_ROUNDS, race_s
from grpo_autotune.search.folder import SearchFolder, fingerprint
from grpo_autotune.search.guard_trials import RewardTrials, group_s, open_questions
from grpo_autotune.search.start import Fit, Recalled, measure_baseline, open_search, recall, refuse_server
from grpo_autotune.search.study import Claim, Sampler, name_of
from grpo_autotune.search.summary import FILES, report_of_search
from grpo_autotune.search.trial_log import PinnedRunner, Task, TrialLog, TrialRunner, View, plain
from grpo_autotune.search.tuned_files import write_tuned
from grpo_autotune.units import hms

FAILURES = 4
"""So many failures in a row that no knob explains end a search."""
EARLY = "grpo.use_vllm"
"""Switch whose gain no formula predicts, and which may be the largest on a GPU: it is tried first there."""
SAMPLER_EVERY = 3
"""Every third proposal is the sampler's."""
SAMPLER: Sampler = "tpe"
OWN_EVERY = 5
OWN_SHARE = 0.08
"""The user's configuration is measured again after so many trials, where that takes no larger part of the budget."""
OWN_FAILURES = 2
SHARED = 2
"""Other machines' best combinations that are measured here, too."""
QUESTIONS_AT = 0.4
"""Part of the time for trials after which rewards of the leader's values are compared, so that what is left goes to
values that hold; and how much of the time left each comparison may take."""
QUESTIONS_ROOM = 0.5


class Session:
    """One search after its probe; `shared` is True where several machines share the study, `wait` sleeps for so many
    seconds between two looks at several workers."""

    def __init__(
        self, evaluator: Evaluator, pool: Pool, sampler: Sampler, *, shared: bool, wait: Callable[[float], None]
    ) -> None:
        self._evaluator, self._pool, self._sampler, self._shared = evaluator, pool, sampler, shared
        self._board, self._budget, self._log = evaluator.board, evaluator.budget, evaluator.log
        self._study, self._rewards = evaluator.study, RewardTrials(evaluator)
        self._crew, self._since_own = Crew(evaluator, wait), Counter[str | None]()
        self._ended: Ended = "budget"
        self._why_ended = "the budget is spent"
        self._proposals = 0
        self._failures = defaultdict[str | None, list[str]](list)  # by place

    def run(self, recalled: Recalled) -> SearchReport:
        """Search, and leave report and configurations in the folder. ConfigError where the budget is too small,
        NothingSucceeded where the user's own configuration cannot be measured."""
        try:
            if self._budget.total_s == 0.0:
                self._ended, self._why_ended = "prediction", "--budget 0: nothing but the probe was measured"
            else:
                recall(self._evaluator, self._rewards, recalled)
                measure_baseline(self._evaluator)
                self._save_best()
                self._loop()
                self._log.rest()
                self._measure_shared()
                self._finish()
        except KeyboardInterrupt as error:
            self._crew.give_up()
            if not self._board.has_baseline:
                raise
            self._ended, self._why_ended = "interrupted", f"stopped by {signal_of(error)[1]}"
        finally:
            self._log.close()
            self._study.close()
        report = self._report(self._why_ended)
        write_tuned(self._log.task, self._board, report)
        write_whole(self._log.task.folder.report, report.model_dump_json(indent=2) + "\n")
        self._log.save_state(finished=self._ended != "interrupted")
        return report

    def _report(self, why_ended: str) -> SearchReport:
        return report_of_search(self._evaluator, self._pool, self._ended, why_ended, self._sampler)

    def _save_best(self) -> None:
        write_tuned(self._log.task, self._board, self._report("under way"))

    # The trials

    def _loop(self) -> None:
        """Measure the most promising until nothing is, or the time for it is over."""
        while True:
            while self._ended != "failing" and self._give_next():
                pass
            if not self._crew.is_busy:
                return
            self._take(*self._crew.next_ended())

    def _give_next(self) -> bool:
        """Give the first idle worker that has one its next trial."""
        for place in self._crew.idle:
            self._ended = "budget"
            if (order := self._next_order(place)) is not None:
                self._crew.give(order)
                return True
        return False

    def _next_order(self, place: str | None) -> Order | None:
        """The next trial of an idle worker; None where it waits for the others, or the loop is over. What does not fit
        into a worker's share of the memory runs alone, once nothing else is left."""
        if (order := self._look_at_pace(place)) is not None:
            return order
        self._why_ended = "no other trial fits into what is left of the budget"
        if place is not None and place not in self._board.paces:  # not even the user's own did
            return None
        ranking = self._rank(place)
        self._keep_for_the_end()
        spent_share = 1.0 - self._budget.search_left_s / (self._budget.total_s - self._budget.end_s)
        late = not ranking.proposals or spent_share > QUESTIONS_AT
        claim, source = (None, "") if late and self._questions() else self._next(ranking, place)
        if claim is not None:
            return self._evaluator.order(claim.knobs, source, self._budget.search_left_s, claim, place)
        if self._crew.is_busy:
            return None
        if self._questions():
            self._judge_rewards()
            return self._next_order(place)
        if self._evaluator.share(place) < 1.0:
            return self._next_order(None)
        if not ranking.proposals:
            self._ended, self._why_ended = "exhausted", "nothing that is left can beat the best"
        return None

    def _take(self, order: Order, outcome: TrialOutcome) -> None:
        """Learn from a trial that ended."""
        entry, spec = self._evaluator.take(order, outcome), order.spec
        if outcome.status == "killed":
            where = f" on {spec.place}" if spec.place else ""
            self._log.said.append(f"trial {spec.number}{where} is lost: {outcome.why}; another process takes the next")
        if spec.source == "again":
            self._leave_out_failing(spec.place)
            return
        if entry is not None:
            self._failures[spec.place].clear()
            self._pool.add_neighbours(entry.knobs)
        else:
            self._count_failure(spec.place)
        self._save_best()

    def _look_at_pace(self, place: str | None) -> Order | None:
        """The trial of the user's configuration, now and then, that shows how fast the machine is meanwhile; on a
        worker's place the first, which the others are compared with."""
        knobs, budget = self._board.baseline_knobs, self._budget
        room_s = min(OWN_SHARE * budget.total_s, budget.search_left_s / 2.0)
        if first := place is not None and place not in self._board.paces:
            room_s = budget.search_left_s
        self._since_own[place] += 1
        if not (first or self._since_own[place] > OWN_EVERY) or not self._evaluator.affords(knobs, room_s, place):
            return None
        self._since_own[place] = -1
        return self._evaluator.order(knobs, "again", room_s, place=place)

    def _leave_out_failing(self, place: str | None) -> None:
        """Go on without a worker that twice could not measure the user's configuration."""
        failed = [row for row in self._log.rows if row.place == place and row.source == "again" and row.status != "ok"]
        if place is None or place in self._board.paces or len(failed) < OWN_FAILURES:
            return
        self._leave_out(place, f"{place} could not measure your configuration ({failed[-1].status}: {failed[-1].why})")

    def _leave_out(self, place: str | None, why: str) -> None:
        """Go on without a worker, or end the search where it was the last."""
        if self._crew.leave_out(place):
            self._log.said.append(f"{why}: the search goes on without it")
        else:
            self._ended, self._why_ended = "failing", why

    def _keep_for_the_end(self) -> None:
        """Keep time for the leader's worst case and race; with nothing to race, a first rival is worth more."""
        evaluator, leader = self._evaluator, self._board.ranking("open")[0]
        if leader is self._board.baseline:
            self._budget.keep()
            return
        trial_s = evaluator.expected_s(leader.knobs)
        more_s = group_s(evaluator, leader) + (trial_s if leader.place is not None else 0.0)  # once more, alone
        plain_s = more_s + trial_s + end_s(evaluator, leader)  # with a trial without changes that bring nothing
        best_s = plain_s + race_s(evaluator, leader, FIRST_ROUNDS, leader)  # against what is close
        if others := contenders(evaluator, leader, MOST_END_SHARE * self._budget.total_s - more_s):
            best_s = more_s + end_s(evaluator, leader, others)
        self._budget.keep(best_s, plain_s, more_s + end_s(evaluator, leader, rounds=LEAST_ROUNDS))

    def _rank(self, place: str | None) -> Ranking:
        taken = self._study.taken() | self._known()
        left = [knobs for name, knobs in self._pool.points.items() if name not in taken]
        whole = self._log.memory_bytes
        bytes_ = None if whole is None else int(self._evaluator.share(place) * whole)
        ranking = rank(left, self._board, self._evaluator.models, bytes_)
        self._log.skipped = ranking.rows()
        return ranking

    def _known(self) -> set[str]:
        """Combinations that were measured or failed here; a failed trial says nothing of others and is not repeated."""
        return set(self._board.entries) | self._tried()

    def _tried(self) -> set[str]:
        timed = [row for row in self._log.rows if row.purpose == "timed"]
        lost = Counter(name_of(row.knobs) for row in timed if row.status == "killed")  # which says nothing of it
        return {name_of(row.knobs) for row in timed if row.status != "killed"} | {n for n in lost if lost[n] > 1}

    def _next(self, ranking: Ranking, place: str | None) -> tuple[Claim | None, str]:
        """The next combination whose trial on a place fits into the time, and its source; None where none does."""
        rewards_s = min(0.25 * self._budget.total_s, 2 * self._rewards.cost_s(32)) if self._questions() else 0.0
        room_s = self._budget.search_left_s - rewards_s
        costs, steps, sure = self._evaluator.costs, self._evaluator.steps, SURE * self._evaluator.slower(place)
        fitting = [p.knobs for p in ranking.proposals if sure * costs.trial_s(p.step_s, steps(p.step_s)) <= room_s]
        if not fitting:
            return None, ""
        self._proposals += 1
        if self._proposals % SAMPLER_EVERY == 0:
            claim, source = self._study.suggest(fitting), "sampler"
        else:
            claim, source = self._study.ask(self._early(fitting) or fitting[0]), "models"
        name = name_of(claim.knobs)
        if name in {name_of(knobs) for knobs in fitting}:
            return claim, source
        if name in self._tried():  # put back by another machine that had lost it; known here
            self._study.fail(claim, "known")
            return self._next(ranking, place)
        return claim, "queue"

    def _early(self, fitting: list[Knobs]) -> Knobs | None:
        """The smallest change to another engine, where the trials run on a GPU; None once one was tried."""
        tried = any(row.knobs.get(EARLY) for row in self._log.rows)
        if tried or self._board.baseline_knobs.get(EARLY) is not False or not self._evaluator.machine.gpus:
            return None
        switched = [knobs for knobs in fitting if knobs.get(EARLY)]
        return min(switched, key=lambda knobs: len(self._board.changed(knobs)), default=None)

    def _questions(self) -> list[tuple[str, Any]]:
        """Values of the leader's learning knobs that rewards have to judge; a refuted value leads nobody."""
        return open_questions(self._board, self._board.ranking("open")[0])

    def _judge_rewards(self) -> None:
        """Judge the values that the leader waits for, with half the time that is left for trials."""
        for key, value in self._questions():
            self._rewards.judge(key, value, QUESTIONS_ROOM * self._budget.search_left_s)
        self._save_best()

    def _count_failure(self, place: str | None) -> None:
        """Leave out a worker whose trials fail one after another for a reason that no knob explains."""
        last, failures = self._log.rows[-1], self._failures[place]
        if last.status in ("oom", "timeout", "invalid"):
            failures.clear()
            return
        failures.append(last.status)
        if len(failures) >= FAILURES and len(set(failures)) == 1:
            why = f"{len(failures)} trials in a row ended with {last.status}: {last.why or 'no reason'}"
            self._leave_out(place, f"{place}: {why}" if place else why)

    def _measure_shared(self) -> None:
        """Measure here the best combinations of the other machines of a shared study."""
        for knobs, _ in self._study.scores()[:SHARED] if self._shared else ():
            room_s = self._budget.search_left_s
            if name_of(knobs) not in self._known() and self._evaluator.affords(knobs, room_s):
                self._evaluator.timed(knobs, "shared", self._budget.search_left_s)

    def _finish(self) -> None:
        """Test the best of each file, then measure the parts of the winner's changes."""
        ending = Ending(self._evaluator)
        ending.judge_groups()
        for level in FILES:
            ending.settle(level)
        self._save_best()
        ending.ablate()


def search(
    config: RunConfig,
    *,
    budget_s: float,
    out: Path | None,
    run_dir: Path,
    resume: bool = False,
    storage: str | None = None,
    view: View,
    runner: Callable[[Path], TrialRunner],
    script: list[str] | None = None,
    fit: Fit = Models.from_probe,
    sampler: Sampler = SAMPLER,
    clock: Callable[[], float] = time.monotonic,
    machine: Machine | None = None,
    places: tuple[Place, ...] = (),
    worker: Callable[[Path, Place], PinnedRunner] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> SearchReport:
    """Search for a faster configuration that learns the same, for `budget_s` seconds in all (0 predicts from a probe
    alone), in the folder `run_dir`, or go on there with `resume`.

    A copy of `tuned.yaml` goes to `out`. `storage` is the URL of a study that several machines share, `runner` makes
    the runner of trials in a folder, and a `script` with its arguments has its `GRPOConfig` searched instead. With
    `places` there is a worker for each, whose trials run beside the others': `worker` makes its runner.

    ConfigError where the folder is in use or finished, the budget too small, the space empty, or the study another
    one's; EnvironmentProblem where the disk is full, or the database's driver is missing; NothingSucceeded where the
    user's own configuration cannot be measured."""
    begun = clock()
    folder, machine = SearchFolder(run_dir), machine or detect()
    task = Task(config, machine, folder, fingerprint_of(config, script), script, out, places)
    refuse_server(config, places)
    with folder.locked():
        plain_print = fingerprint_of(config.model_copy(update={"speedups": "none"}), script)
        state = folder.check(task.fingerprint, without_speedups=plain_print, resume=resume)
        write_whole(folder.config, config.to_yaml())
        write_whole(folder.machine, machine.model_dump_json(indent=2) + "\n")
        budget = Budget(budget_s, state.elapsed_s if state else 0.0, clock, begun)
        if budget_s and budget.left_s <= 0.0:
            fix = "Give a larger one; the time spent counts."
            raise ConfigError(f"this search has spent {hms(budget.elapsed_s)} already", where="--budget", fix=fix)
        recalled = folder.trials() if state else []
        workers = {place.name: worker(run_dir, place) for place in places} if worker is not None else {}
        with full_disk_told(run_dir), closing(TrialLog(task, runner(run_dir), budget, view, workers, wait)) as log:
            evaluator, pool = open_search(log, recalled, fit, storage, sampler)
            return Session(evaluator, pool, sampler, shared=bool(storage), wait=wait).run(recalled)


def fingerprint_of(config: RunConfig, script: list[str] | None) -> str:
    """Fingerprint of a study's subject: everything but paths and the length of the search."""
    values = plain(config)
    values.pop("output", None)
    if values["speedups"] == "none":
        values.pop("speedups")  # the folder of a search without speed-ups may leave the key out
    values["search"] = {key: value for key, value in values.get("search", {}).items() if key in ("knobs", "steps")}
    return fingerprint(json.dumps([values, script], sort_keys=True))
