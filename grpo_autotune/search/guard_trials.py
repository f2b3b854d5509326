"""What has to be shown before a combination may win: rewards for learning knobs, and the worst step it may meet."""

from __future__ import annotations

import math
from typing import Any

from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.objective import living_ratio
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import PromptReward, TrialOutcome, TrialSpec
from grpo_autotune.search.budget import SURE
from grpo_autotune.search.evaluator import Lab
from grpo_autotune.search.leaderboard import GROUP, JUDGED_BY_REWARDS, Book, Entry, median_ratio, scaled
from grpo_autotune.search.noninferiority import LEAST_PROMPTS, NO_TIME, judge_generations, judge_rewards
from grpo_autotune.search.study import name_of

PROMPTS = (256, 128, 64, 32, 16)
"""Compared at most, and fewer where time is short."""
MARGIN = 1.3
"""Free lengths vary, and a trial of rewards that is cut short has none."""
GENERATING = ("generation", "prompt", "reward", "data", "engine", "weight_sync")
"""Stages of a step that a trial of rewards alone goes through."""


def open_questions(book: Book, entry: Entry) -> list[tuple[str, Any]]:
    """The learning knobs of an entry, with their values, that rewards could judge and have not."""
    changed = book.changed(entry.knobs)
    return [
        (key, value)
        for key, value in changed.items()
        if key in JUDGED_BY_REWARDS and book.kind(key) == "learning" and book.guard(key, value) is None
        and key not in book.config.search.accept
    ]  # fmt: skip


class Rewards:
    """Rewards by value of a knob, on the same prompts; the user's own are measured once."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._own: list[PromptReward] | None = None
        self._batches = 0

    def cost_s(self, prompts: int) -> float:
        """Seconds of one trial over so many prompts."""
        lab = self._lab
        stages = lab.models.stages_s(lab.config)
        step_s = sum(stages[name].value for name in GENERATING if name in stages)
        return lab.costs.beside_s + MARGIN * self._count(prompts) * step_s * _generations_per_batch(lab.book)

    def judge(self, key: str, value: Any, room_s: float) -> Guard:
        """Compare a value with the user's own in at most `room_s` seconds."""
        lab, before = self._lab, self._lab.book.own[key]
        missing = 1 if self._own is not None else 2
        prompts = next((n for n in PROMPTS if missing * self.cost_s(n) <= room_s), None)
        if prompts is None:
            return Guard(key=key, before=before, after=value, proven=False, why=NO_TIME, prompts_needed=LEAST_PROMPTS)
        batches = self._count(prompts)
        if self._own is None:
            self._batches = batches
            self._own = self._measure({}, batches, room_s / 2)
        rewards = self._measure({key: value}, min(batches, self._batches), room_s / missing)
        search = lab.config.search
        guard = judge_rewards(
            key, before, value, self._own, rewards, margin=search.max_reward_drop, confidence=search.confidence
        )
        lab.book.note(guard)
        return guard

    def recall(self, spec: TrialSpec, rewards: list[PromptReward]) -> None:
        """Take a trial of an earlier process into account."""
        book, search = self._lab.book, self._lab.config.search
        if not spec.knobs:
            self._own, self._batches = rewards, spec.steps
        elif self._own is not None:
            ((key, value),) = spec.knobs.items()
            book.note(
                judge_rewards(
                    key, book.own[key], value, self._own, rewards,
                    margin=search.max_reward_drop, confidence=search.confidence,
                )
            )  # fmt: skip

    def _count(self, prompts: int) -> int:
        return max(1, math.ceil(prompts / self._lab.config.batch.prompts_per_generation))

    def _measure(self, knobs: Knobs, batches: int, limit_s: float) -> list[PromptReward]:
        lab = self._lab
        config = lab.book.config_of({**lab.book.own, **knobs})
        spec = lab.spec("rewards", config, knobs, limit_s, steps=batches, warmup=0, source="guard")
        outcome = lab.run(spec)
        lab.write(spec, outcome)
        return outcome.rewards


def group_s(lab: Lab, entry: Entry) -> float:
    """Seconds that judging an entry's group size is expected to take; nothing where all for it was measured."""
    book = lab.book
    without = {**entry.knobs, GROUP: book.own.get(GROUP)}
    known = GROUP not in book.changed(entry.knobs) or name_of(without) in book.entries
    return 0.0 if known or book.proof(GROUP, entry.knobs[GROUP]) != "unproven" else SURE * lab.expected_s(without)


def judge_group(lab: Lab, entry: Entry, room_s: float) -> None:
    """Judge an entry's group size by what that change alone brings: against the same combination with the user's own,
    which is measured for it where `room_s` seconds hold that."""
    book = lab.book
    after = book.changed(entry.knobs).get(GROUP)
    known = book.guard(GROUP, after)
    if after is None or GROUP in book.config.search.accept or (known is not None and known.proven):
        return
    before = book.own[GROUP]
    without = {**entry.knobs, GROUP: before}
    there = book.entries.get(name_of(without))
    if there is None and SURE * lab.expected_s(without) <= room_s:
        there = lab.timed(without, "revert", room_s)
    if there is None:
        why = "what it brings alone was not measured"
        book.note(Guard(key=GROUP, before=before, after=after, proven=False, why=why))
        return
    worth = book.worth(entry.config) / book.worth(there.config)
    speed = scaled(median_ratio(there.cycles_s, entry.cycles_s, book.confidence), worth)
    living = living_ratio(book.record, before, after, book.confidence)
    book.note(judge_generations(before, after, living, speed, None))


def worst_case_s(lab: Lab, entry: Entry) -> float:
    """Seconds that its worst-case step is expected to take."""
    return lab.costs.beside_s + 3.0 * entry.step.value


def stand_worst_case(lab: Lab, entry: Entry, room_s: float) -> bool | None:
    """One step with the longest prompts, largest images and full-length completions; null where there is no time."""
    if worst_case_s(lab, entry) > room_s:
        return None
    spec = lab.spec("worst_case", entry.config, entry.knobs, room_s, steps=1, warmup=1, source="proof")
    outcome = lab.run(spec)
    lab.write(spec, outcome)
    return note_worst_case(entry, outcome)


def note_worst_case(entry: Entry, outcome: TrialOutcome) -> bool | None:
    """Enter how its worst-case step went; null where time was up."""
    if outcome.status == "timeout":
        return None
    if outcome.status == "ok":
        entry.worst_case = "passed"
        entry.saw_peak(outcome.peak_bytes)
        return True
    entry.fails = f"the worst-case step ended with {outcome.status}: {outcome.why or 'no reason given'}"
    return False


def _generations_per_batch(book: Book) -> float:
    """How many steps' worth of generation one generation batch is."""
    plan = book.config.batch
    return plan.steps_per_generation * plan.num_iterations / plan.accumulation
