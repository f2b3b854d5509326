"""From what a search has found so far to its report: arithmetic on the book, nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.objective import Interval, step_interval
from grpo_autotune.predict.room import LEAST_CHANCE, chance_to_fit
from grpo_autotune.records.search import Candidate, Ended, ModelError, ParetoRow, SearchReport
from grpo_autotune.search.ablation import contributions, exact_share
from grpo_autotune.search.acquisition import Pool
from grpo_autotune.search.evaluator import Lab
from grpo_autotune.search.leaderboard import GROUP, Book, Entry, Level
from grpo_autotune.search.space import Space
from grpo_autotune.search.study import name_of


def report_of_search(lab: Lab, space: Space, pool: Pool, ended: Ended, why_ended: str, sampler: str) -> SearchReport:
    """Everything that is known now."""
    book = lab.book
    measured = name_of(book.own) in book.entries
    chosen = _measured(book) if measured else _predicted(lab, pool)
    winner = book.best("tuned") if measured else None
    return SearchReport(
        ended=ended,
        why_ended=why_ended,
        baseline=chosen[0],
        best=chosen[1],
        best_exact=chosen[2],
        best_fast=chosen[3],
        exact_share=exact_share(lab, winner) if winner is not None else None,
        contributions=contributions(lab, winner) if winner is not None else [],
        guards=list(book.guards.values()),
        pareto=pareto(book) if measured else [],
        trials=lab.rows,
        skipped=lab.skipped,
        model_error={stage: ModelError(**error) for stage, error in lab.models.errors().items()},
        notes=[*notes(lab), *_of_pool(pool)],
        space={key: list(values) for key, values in space.values.items()},
        points=len(pool.points),
        sampler=sampler,
        confidence=book.confidence,
        memory_limit_bytes=lab.memory_bytes,
        budget_s=lab.budget.total_s,
        elapsed_s=lab.budget.elapsed_s,
        files=_files(lab),
        machine=lab.machine.model_dump(mode="json"),
        config=lab.config.model_dump(mode="json"),
    )


def candidate(book: Book, entry: Entry) -> Candidate:
    """What is known of a measured combination."""
    speed, step, own = book.speedup(entry), entry.raced_s or entry.step, entry.raced_own_s or book.baseline.step
    return Candidate(
        knobs=entry.knobs,
        changed=book.changed(entry.knobs),
        number=entry.number,
        score=book.score(entry.config, step.value),
        step_s=step.value,
        baseline_step_s=own.value,
        step_s_ci=_ends(step),
        steps=step.n,
        predicted_s=entry.predicted_s,
        speedup=speed.value,
        ci=_ends(speed),
        raced=entry.raced is not None,
        peak_bytes=entry.peak_bytes,
        worst_case=entry.worst_case,
    )


def pareto(book: Book) -> list[ParetoRow]:
    """Combinations that no other beats in speed, memory and reward at once, fastest first.

    Rewards differ only by learning knobs; a difference that was not measured can beat, and be beaten by, only what
    changes the same to the same values.
    """
    rows = [(entry, reward_difference(book, entry.knobs)) for entry in book.entries.values() if entry.fails is None]
    kept = [
        ParetoRow(
            number=entry.number,
            changed=book.changed(entry.knobs),
            speedup=book.speedup(entry).value,
            reward_difference=reward,
            peak_bytes=entry.peak_bytes,
        )
        for entry, reward in rows
        if not any(
            _beats(book, other, other_reward, entry, reward) for other, other_reward in rows if other is not entry
        )
    ]
    return sorted(kept, key=lambda row: -row.speedup)


def reward_difference(book: Book, knobs: Knobs) -> float | None:
    """Sum of the measured differences of the changed learning knobs; 0 without any, null where one is unknown.

    A policy's answers are worth the same however many are drawn of it, so the group size makes no difference.
    """
    total = 0.0
    for key in book.learning(knobs):
        if key == GROUP:
            continue
        guard = book.guard(key, knobs[key])
        if guard is None or guard.reward_difference is None:
            return None
        total += guard.reward_difference
    return total


def notes(lab: Lab) -> Iterator[str]:
    """What a reader must know beside the numbers."""
    book, tokens = lab.book, lab.book.record.tokens
    if book.living is None:
        yield (
            "No group of the probe had any spread of rewards, so the score counts completions a second, and "
            "num_generations stays as it is."
        )
    elif tokens is not None and GROUP in book.own:
        share = (
            f"{book.living.share(book.own[GROUP]):.0%} of groups of {book.own[GROUP]} are expected to have any spread"
        )
        yield f"{share} of rewards, from the pass rates of {tokens.groups} groups of the probe."
    for entry in book.entries.values():
        if entry.fails is not None:
            yield f"Trial {entry.number} was fast and may not win: {entry.fails}."
    yield from sorted(lab.notes)


def _of_pool(pool: Pool) -> Iterator[str]:
    if not pool.whole:
        yield (
            "There are more legal combinations than were looked at: those with the fewest changes, and the neighbours "
            "of what was measured."
        )


def _measured(book: Book) -> tuple[Candidate, Candidate, Candidate, Candidate]:
    levels: tuple[Level, Level, Level] = ("tuned", "exact", "fast")
    best, exact, fast = (candidate(book, book.best(level)) for level in levels)
    return candidate(book, book.baseline), best, exact, fast


def _predicted(lab: Lab, pool: Pool) -> tuple[Candidate, Candidate, Candidate, Candidate]:
    """The models' choice for `--budget 0`: the user's configuration by the probe, the others by prediction."""
    book, models = lab.book, lab.models
    own = step_interval(book.record.timings.step_s, book.record.timings.cycle, book.confidence)
    own_s = own.value
    ranked = []
    for knobs in pool.points.values():
        config = book.config_of(knobs)
        step = models.step_s(config)
        ratio = step.value / models.step_s(book.config).value
        if chance_to_fit(models, config, lab.memory_bytes) < LEAST_CHANCE or book.longer(config, ratio):
            continue
        if book.living is None and GROUP in book.changed(knobs):
            continue
        speed = book.worth(config) / ratio
        ranked.append(
            Candidate(
                knobs=knobs,
                changed=book.changed(knobs),
                number=None,
                score=book.score(config, step.value),
                step_s=step.value,
                baseline_step_s=own_s,
                step_s_ci=[step.low, step.high],
                steps=0,
                predicted_s=step.value,
                speedup=speed,
                ci=[speed * step.value / step.high, speed * step.value / max(step.low, 1e-9)],
                raced=False,
                peak_bytes=round(models.peak_bytes(config, worst_case=True).value),
            )
        )
    ranked.sort(key=lambda row: -row.speedup)
    baseline = Candidate(
        knobs=book.own,
        changed={},
        number=None,
        score=book.score(book.config, own_s),
        step_s=own_s,
        baseline_step_s=own_s,
        step_s_ci=_ends(own),
        steps=own.n,
        predicted_s=None,
        speedup=1.0,
        ci=[1.0, 1.0],
        raced=False,
        peak_bytes=None,
    )

    def first(allowed: tuple[str, ...]) -> Candidate:
        fit = (row for row in ranked if {book.proof(k, v) for k, v in row.changed.items()} <= set(allowed))
        found = next(fit, baseline)
        return found if found.speedup > 1.0 else baseline

    exact = first(("exact",))
    return baseline, first(("exact", "accepted")), exact, first(("exact", "accepted", "proven", "unproven"))


def _beats(book: Book, one: Entry, one_reward: float | None, other: Entry, other_reward: float | None) -> bool:
    if one_reward is None or other_reward is None:
        same = all(one.knobs[key] == other.knobs[key] for key in book.own if book.kind(key) == "learning")
        one_reward = other_reward = 0.0
        if not same:
            return False
    ones, others = _standing(book, one, one_reward), _standing(book, other, other_reward)
    return all(a >= b for a, b in zip(ones, others, strict=True)) and ones != others


def _standing(book: Book, entry: Entry, reward: float) -> tuple[float, float, float]:
    return book.speedup(entry).value, reward, -float(entry.peak_bytes or 0)


def _ends(interval: Interval) -> list[float]:
    """Both ends, finite: a single value has no interval, and JSON no infinity."""
    low = interval.low if math.isfinite(interval.low) else interval.value
    return [low, interval.high if math.isfinite(interval.high) else interval.value]


def _files(lab: Lab) -> dict[str, str]:
    folder = lab.folder
    found = {which: str(folder.tuned(which)) for which in ("tuned", "exact", "fast")}
    found |= {"report": str(folder.report), "study": str(folder.journal), "trials": str(folder.path / "trials")}
    return found | ({"out": str(lab.out)} if lab.out is not None else {})
