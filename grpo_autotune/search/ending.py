"""End of a search: worst case and race for whatever would be written, and for all that takes its place after them.

An entry that leads is tested once: first the best of each file without changes that bring nothing, later what ablation
trials bring up. Only where time runs out is a winner written that was not raced.
"""

from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.search.ablation import SMALL, measure_ablations, simpler, taken_back
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.final_race import race, race_s
from grpo_autotune.search.guard_trials import judge_group, run_worst_case, worst_case_s
from grpo_autotune.search.leaderboard import TIE, Entry, Level
from grpo_autotune.search.study import name_of

FINALISTS = 3


def end_s(evaluator: Evaluator, entry: Entry) -> float:
    """Expected seconds of an entry's worst case and race, with what they may take longer."""
    return SURE * (race_s(evaluator, entry) + worst_case_s(evaluator, entry))


class Ending:
    """The tests of a search's leaders."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self._board, self._budget = evaluator, evaluator.board, evaluator.budget
        self._tested: set[str] = set()

    def judge_groups(self) -> None:
        """Judge the group sizes that `tuned.yaml` waits for, with the time that the race does not need."""
        for entry in self._board.ranking("open")[:FINALISTS]:
            changed = self._board.changed(entry.knobs)
            if [key for key, value in changed.items() if self._board.evidence(key, value) == "unproven"] == [GROUP]:
                entry = self._alone(entry)
                judge_group(self._evaluator, entry, self._budget.left_s - end_s(self._evaluator, entry))

    def settle(self, level: Level) -> None:
        """Test the best of a file, the next best only where it does not hold, and what challenges one that does."""
        for _ in range(FINALISTS):
            entry = self._challenger(level)
            if entry is None:
                return
            self._test(entry)

    def ablate(self) -> None:
        """Measure the parts of the winner's changes; what that brings up is tested in its turn."""
        while (winner := self._board.best("tuned")).race is not None:
            measure_ablations(self._evaluator, winner, end_s(self._evaluator, winner))
            self.settle("tuned")
            if self._board.best("tuned") is winner:
                return

    def _challenger(self, level: Level) -> Entry | None:
        """The entry to test next; None where the leader has held, or has had all the time there was."""
        board, leader = self._board, self._board.best(level)
        rivals = [e for e in board.ranking(level) if e is not board.baseline and board.speedup(e).value > 1.0]
        if leader.race is not None:
            fresh = (entry for entry in rivals if name_of(entry.knobs) not in self._tested)
            return next((entry for entry in fresh if self._challenges(entry, leader)), None)
        for rival in rivals[:FINALISTS]:
            entry = self._without_idle(rival)
            if name_of(entry.knobs) not in self._tested:
                return entry
            if entry.fails is None and entry.race is None:
                return None
        return None

    def _challenges(self, entry: Entry, leader: Entry) -> bool:
        """True where a race may show an entry to be faster than a raced leader, or as fast with fewer changes."""
        loss = self._board.ratio(entry, leader)
        fewer = len(self._board.changed(entry.knobs)) < len(self._board.changed(leader.knobs))
        return loss.value < 1.0 - TIE or (fewer and loss.low <= 1.0 and loss.value < SMALL)

    def _without_idle(self, entry: Entry) -> Entry:
        """An entry without its changes that bring nothing: by prediction, and by a trial where there is time."""
        entry = self._alone(entry)
        room_s = self._budget.left_s - end_s(self._evaluator, entry)
        fewer = taken_back(self._evaluator, simpler(self._evaluator, entry), room_s)
        if fewer is None or fewer.fails is not None:
            return entry
        loss = self._board.ratio(fewer, entry)
        return fewer if loss.low <= 1.0 and loss.value < SMALL else entry

    def _test(self, entry: Entry) -> None:
        """Run an entry's worst case and race, while there is time."""
        entry = self._alone(entry)
        evaluator, left_s = self._evaluator, self._budget.left_s
        self._tested.add(name_of(entry.knobs))
        if entry.worst_case == "not run":
            entry = run_worst_case(evaluator, entry, max(left_s / 2, left_s - race_s(evaluator, entry)))
        if entry.fails is None:
            entry = race(evaluator, entry, self._budget.left_s)
            judge_group(evaluator, entry, self._budget.left_s)

    def _alone(self, entry: Entry) -> Entry:
        return self._evaluator.alone(entry, self._budget.left_s - end_s(self._evaluator, entry))
