"""End of a search: worst case and race for whatever would be written, and for all that takes its place after them.

What trials at different times do not surely tell apart is raced side by side: in the leader's race with the user's
configuration, or where that has no room for it in pairs, first the combinations that lead, then the best of them
against itself without each change. What is no better beyond noise gives way to what is simpler. An entry that leads is
tested once, and so is what ablation trials bring up later. Only where time runs out is a winner written that was not
raced.
"""

import math
from collections.abc import Sequence
from typing import get_args

from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import GROUP, why_not
from grpo_autotune.predict.room import MEMORY_SHARE
from grpo_autotune.search.ablation import SMALL, contribution, measure_ablations, simpler, taken_back
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.final_race import CLOSE_ROUNDS, LEAST_ROUNDS, compare, first_rounds, is_over, race, race_s
from grpo_autotune.search.guard_trials import judge_group, run_worst_case, worst_case_s
from grpo_autotune.search.leaderboard import TIE, Entry, Level
from grpo_autotune.search.study import name_of

FINALISTS = 3
CLOSE = 1.5
"""On a machine that others use, too, one combination may differ by so much from itself from one trial to the next."""
MOST_BESIDE = 3
"""So many run beside the leader and the user's in their race."""
RIVALS = 6
"""So many of those that come closest to the best by their trials may be raced against it."""


def end_s(evaluator: Evaluator, entry: Entry, beside: Sequence[Knobs] = (), rounds: int | None = None) -> float:
    """Expected seconds of an entry's worst case and race, with others `beside` it and of so many rounds, with what they
    may take longer; of what is not done yet."""
    missing_s, is_new = 0.0, entry.worst_case == "not run"
    if entry.race is None or not is_over(entry.race.speedup):
        rounds = rounds or first_rounds(evaluator.board.confidence, len(beside))
        missing_s = race_s(evaluator, entry, rounds, beside=beside, alone=is_new)
    return SURE * (missing_s + (worst_case_s(evaluator, entry) if is_new else 0.0))


def contenders(evaluator: Evaluator, entry: Entry, room_s: float) -> list[Knobs]:
    """Combinations that an entry's race can decide on along with it in `room_s` seconds, side by side in memory: the
    entry without one of the changes that bring little, without all of them, and what trials do not surely tell from it.
    None of an entry that was raced, and beside an engine."""
    board, models, memory_bytes = evaluator.board, evaluator.models, evaluator.log.memory_bytes
    configs = [board.config, entry.config]
    if entry.race is not None or memory_bytes is None or any(config.use_vllm for config in configs):
        return []
    factors = {key: contribution(evaluator, entry, key).factor or math.inf for key in board.changed(entry.knobs)}
    small = sorted((key for key in factors if factors[key] < CLOSE), key=factors.__getitem__)
    fewer = [board.without(entry.knobs, key) for key in small]
    level: Level = next(level for level in get_args(Level) if board.allows(entry.knobs, level))
    close = [one.knobs for one in board.ranking(level) if board.ratio(one, entry).value < SMALL]
    failed = [row.knobs for row in evaluator.log.rows if row.status not in ("ok", "timeout")]
    rss_bytes = max((row.rss_bytes or 0 for row in board.record.utilisation), default=0)
    rss_bytes *= board.record.trainer.world_size
    host_bytes = evaluator.machine.memory_bytes
    chosen: list[Knobs] = []
    for knobs in [simpler(evaluator, entry), *fewer, board.without(entry.knobs, *small), *close]:
        config, more = board.config_of(knobs), [*chosen, knobs]
        if knobs in (board.baseline_knobs, entry.knobs, *chosen, *failed) or config.use_vllm:
            continue
        if why_not(board.config, knobs, evaluator.machine) is not None:
            continue
        bytes_ = math.fsum(models.peak_bytes(one).high for one in [*configs, config])
        fit = bytes_ <= MEMORY_SHARE * memory_bytes and (2 + len(more)) * rss_bytes <= MEMORY_SHARE * host_bytes
        if fit and board.allows(knobs, level) and end_s(evaluator, entry, more) <= room_s:
            chosen, configs = more, [*configs, config]
        if len(chosen) == MOST_BESIDE:
            break
    return chosen


class Ending:
    """The tests of a search's leaders."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self._board, self._budget = evaluator, evaluator.board, evaluator.budget
        self._sided: set[str] = set()  # raced with others beside them
        self._failed: set[frozenset[str]] = set()  # pairs that made no round
        self._tested = {name for name, entry in self._board.entries.items() if _held(entry)}  # by an earlier process

    def judge_groups(self) -> None:
        """Judge the group sizes that `tuned.yaml` waits for, with the time that the race does not need."""
        for entry in self._board.ranking("open")[:FINALISTS]:
            changed = self._board.changed(entry.knobs)
            if [key for key, value in changed.items() if self._board.evidence(key, value) == "unproven"] == [GROUP]:
                entry = self._alone(entry)
                judge_group(self._evaluator, entry, self._room_s(entry))

    def settle(self, level: Level) -> None:
        """Test the best of a file, the next best only where it does not hold, and what challenges one that does."""
        for _ in range(FINALISTS + 1):  # one of them may decide between several and is tested after it
            entry = self._challenger(level)
            if entry is None:
                return
            self._test(entry)

    def ablate(self) -> None:
        """Measure the parts of the winner's changes; what that brings up is tested in its turn."""
        while (winner := self._board.best("tuned")).race is not None:
            measure_ablations(self._evaluator, winner, end_s(self._evaluator, winner))
            self.settle("tuned")
            if self._board.best("tuned").knobs == winner.knobs:
                return

    def _challenger(self, level: Level) -> Entry | None:
        """The entry to test next; None where the leader has held, or has had all the time there was."""
        board, leader = self._board, self._board.best(level)
        rivals = [e for e in board.ranking(level) if e is not board.baseline and board.speedup(e).value > 1.0]
        if leader.race is not None and name_of(leader.knobs) in self._tested:
            fresh = (entry for entry in rivals if name_of(entry.knobs) not in self._tested)
            return next((entry for entry in fresh if self._challenges(entry, leader)), None)
        if leader.race is not None:  # beside others
            for other in (entry for entry in rivals if entry.race is not None):
                if other.knobs != (leader := board.best(level)).knobs:
                    self._better(leader, other)
            leader = board.best(level)
            return self._challenger(level) if name_of(leader.knobs) in self._tested else leader
        for number, rival in enumerate(rivals[:FINALISTS]):
            entry = self._alone(rival)
            if name_of(entry.knobs) not in self._tested and self._contenders(entry):
                return entry
            for other in rivals[number + 1 : number + 1 + RIVALS]:
                entry = self._better(entry, other)
            entry = self._without_idle(entry)
            if name_of(entry.knobs) not in self._tested:
                return entry
            if entry.fails is None and entry.race is None:
                return None
        return None

    def _challenges(self, entry: Entry, leader: Entry) -> bool:
        """True where an entry is surely faster than a raced leader, or their race shows it to be, or to be as fast and
        simpler, and there is time for a race of its own."""
        loss, is_simpler = self._board.ratio(entry, leader), self._board.is_simpler(entry, leader)
        faster, least = loss.value < 1.0 - TIE, 1.0 if is_simpler else 1.0 - TIE
        if not faster and not (loss.low <= least and loss.value < SMALL):
            return False
        if end_s(self._evaluator, entry, rounds=LEAST_ROUNDS) > self._budget.left_s:
            return False
        return self._better(leader, entry, unknown=faster and loss.high < 1.0).knobs == entry.knobs

    def _better(self, leader: Entry, rival: Entry, *, unknown: bool = False) -> Entry:
        """The one to recommend of two, by a race of both where trials do not tell them apart and there is time for it;
        else the rival where it is `unknown` to be worse, or as good by their trials and simpler than one that was not
        raced."""
        board, name = self._board, name_of(leader.knobs)
        leader, rival = board.entries[name], board.entries[name_of(rival.knobs)]
        loss, raced = board.ratio(rival, leader), leader.race is not None and rival.race is not None
        pair, close = frozenset((name, name_of(rival.knobs))), loss.low <= 1.0 or (loss.value < CLOSE and not raced)
        if close and pair not in self._failed and not self._evaluator.is_decided(rival, leader):
            room_s = min(self._room_s(leader), self._room_s(rival))
            needed_s = race_s(self._evaluator, rival, CLOSE_ROUNDS, leader)
            if not compare(self._evaluator, leader, rival, max(room_s / 2, min(room_s, needed_s))):
                self._failed.add(pair)
        leader, rival = board.entries[name], board.entries[name_of(rival.knobs)]
        if rival.fails is not None:
            return leader
        if board.pair(rival, leader) is not None:
            return rival if board.prefers(rival, leader) else leader
        as_good = loss.low <= 1.0 and loss.value < SMALL and board.is_simpler(rival, leader)
        as_good = as_good and (leader.race is None or rival.race is not None)
        return rival if unknown or as_good else leader

    def _without_idle(self, entry: Entry) -> Entry:
        """An entry without its changes that bring nothing: by prediction all at once, then one after another."""
        evaluator, board = self._evaluator, self._board
        entry = self._alone(entry)
        entry = self._or_less(entry, simpler(evaluator, entry))
        rows = [contribution(evaluator, entry, key) for key in board.changed(entry.knobs)]
        for row in sorted(rows, key=lambda row: row.factor or 0.0):
            if row.factor is not None and row.factor < CLOSE:
                entry = self._or_less(entry, board.without(entry.knobs, row.key))
        return entry

    def _or_less(self, entry: Entry, knobs: Knobs) -> Entry:
        """The better of an entry and the same with less changed, which is measured where there is time."""
        fewer = taken_back(self._evaluator, knobs, self._room_s(entry))
        if fewer is None or fewer.fails is not None or knobs in (entry.knobs, self._board.baseline_knobs):
            return entry
        return self._better(entry, fewer)

    def _test(self, entry: Entry) -> None:
        """Run an entry's worst case and race, while there is time."""
        entry = self._alone(entry)
        evaluator, left_s = self._evaluator, self._budget.left_s
        if others := self._contenders(entry):
            self._sided.add(name_of(entry.knobs))
            race(evaluator, entry, min(end_s(evaluator, entry, others), left_s), others)
            return
        self._tested.add(name_of(entry.knobs))
        over = entry.race is not None and is_over(entry.race.speedup)
        if entry.worst_case == "not run":
            race_room_s = 0.0 if over else race_s(evaluator, entry, alone=True)
            entry = run_worst_case(evaluator, entry, max(left_s / 2, left_s - race_room_s))
        if entry.fails is None and not over:
            entry = race(evaluator, entry, self._budget.left_s)
        if entry.fails is None:
            judge_group(evaluator, entry, self._budget.left_s)

    def _contenders(self, entry: Entry) -> list[Knobs]:
        """Combinations that its race decides on along with it, once."""
        if name_of(entry.knobs) in self._sided:
            return []
        return contenders(self._evaluator, entry, self._budget.left_s)

    def _alone(self, entry: Entry) -> Entry:
        return self._evaluator.alone(entry, self._room_s(entry))

    def _room_s(self, entry: Entry) -> float:
        """Seconds that an entry's worst case and race do not need."""
        return self._budget.left_s - end_s(self._evaluator, entry)


def _held(entry: Entry) -> bool:
    """True of an entry whose worst case and race need not be run again."""
    return entry.worst_case == "passed" and entry.race is not None and is_over(entry.race.speedup)
