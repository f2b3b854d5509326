"""Trials that guard a winner: rewards for learning knobs, and the worst step that it may meet."""

import math
from typing import Any

from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.predict.objective import living_ratio
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import PromptReward, TrialSpec
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.leaderboard import JUDGED_BY_REWARDS, Entry, Leaderboard
from grpo_autotune.search.noninferiority import LEAST_PROMPTS, NO_TIME, judge_generations, judge_rewards

PROMPTS = (256, 128, 64, 32, 16)
"""Compared at most, and fewer where time is short."""
MARGIN = 1.3
"""Free lengths vary, and a trial of rewards that is cut short has none."""
MOST_LONGER = 4.0
GENERATING = ("generation", "prompt", "tools", "reward", "data", "engine", "weight_sync")
"""Stages of a step that a trial of rewards alone goes through."""


def open_questions(board: Leaderboard, entry: Entry) -> list[tuple[str, Any]]:
    """The learning knobs of an entry, with their values, that rewards could judge and have not."""
    changed, accepted = board.changed(entry.knobs), board.config.search.accept
    keys = [key for key in board.learning(entry.knobs) if key in JUDGED_BY_REWARDS and key not in accepted]
    return [(key, changed[key]) for key in keys if board.guard(key, changed[key]) is None]


class RewardTrials:
    """Rewards by value of a knob, on the same prompts; the user's own are measured once."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self._board = evaluator, evaluator.board
        self._baseline: list[PromptReward] | None = None
        self._batches = 0

    def cost_s(self, prompts: int) -> float:
        """Expected seconds of one trial over so many prompts."""
        stages, plan = self._evaluator.models.stages_s(self._board.config), self._board.config.batch
        step_s = sum(stages[name].value for name in GENERATING if name in stages)
        steps_per_batch = plan.steps_per_generation * plan.num_iterations / plan.accumulation
        return self._evaluator.costs.beside_s + MARGIN * self._count(prompts) * step_s * steps_per_batch

    def judge(self, key: str, value: Any, room_s: float) -> Guard:
        """Compare a value with the user's own in at most `room_s` seconds, and note the judgement."""
        missing = 1 if self._baseline is not None else 2
        prompts = next((n for n in PROMPTS if missing * self.cost_s(n) <= room_s), None)
        if prompts is None:
            before = self._board.baseline_knobs[key]
            change = {"key": key, "before": before, "after": value}
            guard = Guard(**change, proven=False, why=NO_TIME, prompts_needed=LEAST_PROMPTS)
            self._board.note(guard)
            return guard
        batches = self._count(prompts)
        if self._baseline is None:
            self._batches = batches
            self._baseline = self._measure({}, batches, room_s / 2)
        rewards = self._measure({key: value}, min(batches, self._batches), room_s / missing)
        return self._compare(key, value, self._baseline, rewards)

    def recall(self, spec: TrialSpec, rewards: list[PromptReward]) -> None:
        if not spec.knobs:
            self._baseline, self._batches = rewards, spec.steps
        elif self._baseline is not None:
            ((key, value),) = spec.knobs.items()
            self._compare(key, value, self._baseline, rewards)

    def _compare(self, key: str, value: Any, baseline: list[PromptReward], rewards: list[PromptReward]) -> Guard:
        search, before = self._board.config.search, self._board.baseline_knobs[key]
        guard = judge_rewards(
            key, before, value, baseline, rewards, margin=search.max_reward_drop, confidence=search.confidence
        )
        self._board.note(guard)
        return guard

    def _count(self, prompts: int) -> int:
        return max(1, math.ceil(prompts / self._board.config.batch.prompts_per_generation))

    def _measure(self, knobs: Knobs, batches: int, limit_s: float) -> list[PromptReward]:
        return self._evaluator.run("rewards", knobs, limit_s, steps=batches, warmup=0, source="guard").rewards


def group_s(evaluator: Evaluator, entry: Entry) -> float:
    """Expected seconds for judging an entry's group size; 0 where all for it was measured."""
    board = evaluator.board
    if GROUP not in board.changed(entry.knobs) or board.evidence(GROUP, entry.knobs[GROUP]) != "unproven":
        return 0.0
    if board.loses_groups(entry.knobs):
        return 0.0
    ablated = board.without(entry.knobs, GROUP)
    return 0.0 if board.entry(ablated) is not None else SURE * evaluator.expected_s(ablated)


def judge_group(evaluator: Evaluator, entry: Entry, room_s: float) -> None:
    """Judge an entry's group size by that change alone: against the same combination with the user's own, which is
    measured for it where `room_s` seconds hold that."""
    board = evaluator.board
    after = board.changed(entry.knobs).get(GROUP)
    guard = board.guard(GROUP, after)
    if after is None or GROUP in board.config.search.accept or (guard is not None and guard.proven):
        return
    before, knobs = board.baseline_knobs[GROUP], board.without(entry.knobs, GROUP)
    if board.loses_groups(entry.knobs):
        here, theirs = (board.living_groups(config) for config in (entry.config, board.config))
        why = (
            f"a gradient from fewer prompts: {here:.3g} groups with any spread of rewards per step, before {theirs:.3g}"
        )
        board.note(Guard(key=GROUP, before=before, after=after, proven=False, why=why))
        return
    ablated = board.entry(knobs)
    if ablated is not None:
        ablated = evaluator.alone(ablated, room_s)
    elif evaluator.affords(knobs, room_s):
        ablated = evaluator.timed(knobs, "revert", room_s)
    if ablated is None:
        why = "what it brings alone was not measured"
        board.note(Guard(key=GROUP, before=before, after=after, proven=False, why=why))
        return
    living = living_ratio(board.record, before, after, board.confidence)
    board.note(judge_generations(before, after, living, board.ratio(ablated, entry)))


def worst_case_s(evaluator: Evaluator, entry: Entry) -> float:
    """Expected seconds of an entry's worst-case step: one that makes the moments, and one of full-length completions,
    which takes longer by what the longest are longer than those of the probe."""
    tokens, most = evaluator.board.record.tokens, evaluator.board.record.trainer.max_completion_length
    longer = 1.0 if tokens is None else max(1.0, most / max(tokens.completion.max, 1.0))
    return evaluator.costs.beside_s + 3.0 * min(longer, MOST_LONGER) * entry.step.value


def run_worst_case(evaluator: Evaluator, entry: Entry, room_s: float) -> Entry:
    """Run a step with the longest prompts, largest images and full-length completions, if `room_s` seconds hold it."""
    if worst_case_s(evaluator, entry) > room_s:
        return entry
    outcome = evaluator.run("worst_case", entry.knobs, room_s, steps=1, warmup=1, source="proof")
    return evaluator.board.add_worst_case(entry, outcome)
