"""Report of a search: arithmetic on the leaderboard, nothing is measured here."""

import math
from collections.abc import Iterator
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import Interval, Living, step_interval, steps_between
from grpo_autotune.predict.room import fits
from grpo_autotune.records.search import Candidate, Ended, ModelError, ParetoRow, SearchReport
from grpo_autotune.search.ablation import contributions, exact_share
from grpo_autotune.search.acquisition import Pool, run_s
from grpo_autotune.search.comparable import MOST
from grpo_autotune.search.evaluator import Evaluator, expected_share
from grpo_autotune.search.leaderboard import TIE, Entry, Leaderboard, Level
from grpo_autotune.units import plural

FILES: tuple[Level, ...] = ("tuned", "exact", "fast")
SHOWN_SHARE = 0.01
MANY = 0.9
"""Where so large a share was trained on already, steps get hardly longer."""
PART = (
    "There are more legal combinations than were looked at: those with the fewest changes, and the neighbours of what "
    "was measured."
)


def report_of_search(evaluator: Evaluator, pool: Pool, ended: Ended, why_ended: str, sampler: str) -> SearchReport:
    """Everything that is known so far."""
    board, models, log, task = evaluator.board, evaluator.models, evaluator.log, evaluator.log.task
    folder, loads = task.folder, sorted(log.others, key=lambda load: load.cores)
    files: dict[str, str] = {which: str(folder.tuned(which)) for which in FILES}
    files |= {"report": str(folder.report), "study": str(folder.journal), "trials": str(folder.path / "trials")}
    files |= {} if task.out is None else {"out": str(task.out)}
    if board.has_baseline:
        baseline = candidate(board, board.baseline)
        winner = board.best("tuned")
        best, best_exact, best_fast = (candidate(board, board.best(level)) for level in FILES)
        parts = contributions(evaluator, winner)
        share = exact_share(evaluator, winner, parts)
    else:
        baseline, best, best_exact, best_fast = _predicted(board, models, pool, log.memory_bytes)
        share, parts = None, []
    return SearchReport(
        ended=ended,
        why_ended=why_ended,
        baseline=baseline,
        best=best,
        best_exact=best_exact,
        best_fast=best_fast,
        exact_share=share,
        contributions=parts,
        together=best.speedup / math.prod(row.factor or 1.0 for row in parts) if parts else 1.0,
        guards=list(board.guards.values()),
        pareto=pareto(board) if board.has_baseline else [],
        trials=log.rows,
        skipped=log.skipped,
        model_error={stage: ModelError(**error) for stage, error in models.errors().items()},
        notes=[*_workers(evaluator), *_notes(board, best), *sorted(log.notes), *([] if pool.whole else [PART])],
        space={key: list(values) for key, values in pool.space.values.items()},
        points=len(pool.points),
        sampler=sampler,
        confidence=board.confidence,
        memory_limit_bytes=log.memory_bytes,
        evaluation_s=board.evaluation_s,
        saving_s=board.saving_s,
        others=loads[len(loads) // 2] if loads else None,
        budget_s=log.budget.total_s,
        elapsed_s=log.budget.elapsed_s,
        files=files,
        machine=task.machine.model_dump(mode="json"),
        config=board.config.model_dump(mode="json"),
    )


def candidate(board: Leaderboard, entry: Entry) -> Candidate:
    """The row of a measured combination; of one that was raced, seconds and speed-up are the race's."""
    step, baseline = entry.step, board.baseline.step
    if entry.race is not None:
        step, baseline = entry.race.step, entry.race.baseline_step
    share = entry.living_share
    is_even = share is not None and math.isclose(share, expected_share(board, entry.config) or math.nan)
    slope_s = board.rows.slope_s(entry.knobs) if is_even else None
    return _candidate(
        board,
        entry.knobs,
        step,
        baseline.value,
        board.speedup(entry),
        entry.aside_s,
        number=entry.number,
        predicted_s=entry.predicted_s,
        raced=entry.race is not None,
        living_share=entry.living_share,
        living_s=None if slope_s is None or not share else min(slope_s, MOST * step.value / share),
        peak_bytes=entry.peak_bytes,
        worst_case=entry.worst_case,
    )


def _candidate(
    board: Leaderboard, knobs: Knobs, step: Interval, baseline_s: float, speedup: Interval, aside_s: float, **more: Any
) -> Candidate:
    return Candidate(
        knobs=knobs,
        changed=board.changed(knobs),
        score=board.score(board.config_of(knobs), step.value + aside_s),
        step_s=step.value,
        baseline_step_s=baseline_s,
        step_s_ci=_ends(step),
        steps=step.n,
        speedup=speedup.value,
        ci=_ends(speedup),
        **more,
    )


def pareto(board: Leaderboard) -> list[ParetoRow]:
    """Combinations that no other beats in speed, memory and reward at once, fastest first. Rewards differ only by
    learning knobs; a difference that was not measured can beat, and be beaten by, only what changes the same to the
    same values."""
    rows = [(entry, reward_difference(board, entry.knobs)) for entry in board.entries.values() if entry.fails is None]
    front = [
        ParetoRow(
            number=entry.number,
            changed=board.changed(entry.knobs),
            speedup=board.speedup(entry).value,
            reward_difference=reward,
            peak_bytes=entry.peak_bytes,
        )
        for entry, reward in rows
        if not any(_beats(board, *other, entry, reward) for other in rows if other[0] is not entry)
    ]
    return sorted(front, key=lambda row: -row.speedup)


def reward_difference(board: Leaderboard, knobs: Knobs) -> float | None:
    """Sum of the measured differences of the changed learning knobs; 0 without any, None where one is unknown. A
    policy's answers are worth the same however many are drawn of it, so the group size makes no difference."""
    total = 0.0
    for key in board.learning(knobs):
        if key == GROUP:
            continue
        guard = board.guard(key, knobs[key])
        if guard is None or guard.reward_difference is None:
            return None
        total += guard.reward_difference
    return total


def _notes(board: Leaderboard, best: Candidate) -> Iterator[str]:
    """Facts that a reader must know beside the numbers."""
    tokens, group = board.record.tokens, board.baseline_knobs.get(GROUP)
    if board.living is None:
        yield (
            "No group of the probe had any spread of rewards, so the score counts completions per second, and "
            "num_generations stays as it is."
        )
    elif tokens is not None and group is not None:
        yield (
            f"{board.living.share(group):.0%} of groups of {group} are expected to have any spread of rewards, "
            f"from the pass rates of {tokens.groups} groups of the probe."
        )
    yield from _living(board, best)
    yield from _evaluations(board)
    if len(board.pace.looks) > 1:
        least, most = (math.exp(end(log for _, log, _ in board.pace.looks)) for end in (min, max))
        yield (
            f"Your configuration was measured {len(board.pace.looks)} times, and took x {least:.2f} to x {most:.2f} of "
            "its first time: what its steps' scatter does not explain is taken out of comparisons, and the doubt of "
            "that widens their intervals."
        )
    for entry in board.entries.values():
        if entry.fails is not None:
            yield f"Trial {entry.number} was fast and may not win: {entry.fails}."
        if entry.race is not None and entry.race.speedup.low <= 1.0 < entry.race.speedup.value:
            (value, low, high, _), pace = entry.race.speedup, entry.race.baseline_step.value / board.baseline.step.value
            yield (
                f"Trial {entry.number} was raced at x {value:.2f} ({low:.2f} to {high:.2f}), which may be noise: it "
                f"may not win. Your configuration took x {pace:.2f} of its first time there (far from 1: a busy "
                "machine); a search on a quieter one may choose otherwise."
            )


def _living(board: Leaderboard, best: Candidate) -> Iterator[str]:
    """The share of completions that the best's seconds are of, and its seconds and speed-up once all groups live."""
    entry, living = board.entry(best.knobs), board.living
    if best.living_share is None or best.living_share >= MANY or entry is None:
        return
    if best.living_s is None or living is None:
        yield (
            f"The best trained on {best.living_share:.0%} of the completions while it was measured: skip_dead leaves "
            "out groups without a spread of rewards. As training gives more groups one, a step takes longer."
        )
        return
    own_slope_s = candidate(board, board.baseline).living_s or 0.0
    sides = (board.config, own_slope_s), (entry.config, best.living_s)
    own_more_s, more_s = (slope_s * _rest(board, living, config) for config, slope_s in sides)
    own_s, run_s = best.baseline_step_s + board.baseline.aside_s, best.step_s + entry.aside_s
    speedup = best.speedup * (1.0 + own_more_s / own_s) / (1.0 + more_s / run_s)
    own_living, now_living = (living.share(config.batch.num_generations) for config, _ in sides)
    speedup *= own_living / now_living  # each group counts the same once all have one
    yield (
        f"skip_dead leaves out groups without a spread of rewards. Seconds are for {best.living_share:.0%} of the "
        f"completions in others, as the probe's rewards let expect: a step of the best takes {best.step_s:.3g} s. As "
        f"training gives more groups a spread it takes longer, {best.step_s + more_s:.3g} s (x {speedup:.2f}) where "
        "all have one."
    )


def _rest(board: Leaderboard, living: Living, config: RunConfig) -> float:
    """Share of completions by which a step would train on more if all groups had a spread of rewards."""
    share = expected_share(board, config) or 0.0
    return share / living.share(config.batch.num_generations) - share


def _workers(evaluator: Evaluator) -> Iterator[str]:
    """The trials of each worker, what its place and the others cost it, and what befell it."""
    places = evaluator.log.task.places if evaluator.budget.total_s else ()
    for place in places:
        numbers = [str(row.number) for row in evaluator.log.rows if row.place == place.name]
        slower = f"took x {evaluator.slower(place.name):.2f} of its seconds alone there"
        known = f"{slower}, which is taken out of its trials' seconds"
        known = known if place.name in evaluator.board.paces else "was not measured there"
        which = f" ({', '.join(numbers)})" if numbers else ""
        yield f"Worker on {place.name}: {plural(len(numbers), 'trial')}{which}; your configuration {known}."
    if places:
        device = places[0].name if places[0].gpus else "the whole machine"
        yield f"All others ran alone on {device}; leaders were measured there once more, as time was left."
    yield from evaluator.log.said


def _evaluations(board: Leaderboard) -> Iterator[str]:
    """The cost of evaluations and checkpoints, and the keys that decide it: not turned here, since they are the user's
    to judge by."""
    aside_s, step_s, every = board.evaluation_s, board.record.timings.step_s, steps_between(board.config, "evaluate")
    own_s = aside_s + board.saving_s + step_interval(step_s, board.record.timings.cycle, board.confidence).value
    if (saving := board.saving_s / own_s) >= SHOWN_SHARE:
        yield f"Checkpoints (grpo.save_steps) take {saving:.0%} of your run and count in every speed-up."
    if aside_s and every:
        yield (
            f"Evaluations take {aside_s / own_s:.0%} of your run and count in every speed-up (in proportion to "
            f"generation). grpo.eval_steps {every} -> {2 * every} would make the run x "
            f"{own_s / (own_s - aside_s / 2.0):.2f} as fast and changes no weight: yours to choose."
        )
    elif board.config.batch.eval_batch is not None:
        why = "their rows are streamed" if every else "they come at no number of steps"
        yield f"Evaluations are not counted: {why}."


def _predicted(
    board: Leaderboard, models: Models, pool: Pool, memory_bytes: int | None
) -> tuple[Candidate, Candidate, Candidate, Candidate]:
    """The models' choice for `--budget 0`: the user's configuration by the probe, the others by prediction."""
    timings = board.record.timings
    measured = step_interval(timings.step_s, timings.cycle, board.confidence)
    once, aside_s = Interval(1.0, 1.0, 1.0, 0), board.evaluation_s + board.saving_s
    baseline = _candidate(board, board.baseline_knobs, measured, measured.value, once, aside_s)
    baseline_s, ranked = run_s(board, models, board.config).value, list[Candidate]()
    for knobs in pool.points.values():
        config = board.config_of(knobs)
        step, run = models.step_s(config), run_s(board, models, config)
        ratio = run.value / baseline_s
        if not fits(models, config, memory_bytes) or board.is_too_long(config, ratio) or board.is_group_unknown(knobs):
            continue
        speed = board.worth(config) / ratio
        speedup = Interval(speed, speed * run.value / run.high, speed * run.value / max(run.low, 1e-9), 0)
        more = {"predicted_s": step.value, "peak_bytes": round(models.peak_bytes(config, worst_case=True).value)}
        aside_s = run.value - step.value
        ranked.append(_candidate(board, knobs, step._replace(n=0), measured.value, speedup, aside_s, **more))
    ranked.sort(key=lambda row: (-round(math.log(row.speedup) / TIE), len(row.changed), -row.speedup))

    def first(*allowed: str) -> Candidate:
        rows = (row for row in ranked if {board.evidence(k, v) for k, v in row.changed.items()} <= set(allowed))
        best = next(rows, baseline)
        return best if best.speedup > 1.0 else baseline

    fast = first("exact", "accepted", "proven", "unproven")
    return baseline, first("exact", "accepted"), first("exact"), fast


def _beats(board: Leaderboard, one: Entry, one_reward: float | None, other: Entry, other_reward: float | None) -> bool:
    if one_reward is None or other_reward is None:
        keys = [key for key in board.baseline_knobs if board.kind(key) == "learning"]
        if any(one.knobs[key] != other.knobs[key] for key in keys):
            return False
        one_reward = other_reward = 0.0
    ones, others = _objectives(board, one, one_reward), _objectives(board, other, other_reward)
    return all(a >= b for a, b in zip(ones, others, strict=True)) and ones != others


def _objectives(board: Leaderboard, entry: Entry, reward: float) -> tuple[float, float, float]:
    return board.speedup(entry).value, reward, -float(entry.peak_bytes or 0)


def _ends(interval: Interval) -> list[float]:
    """Both ends, finite: a single value has no interval, and JSON no infinity."""
    low = interval.low if math.isfinite(interval.low) else interval.value
    return [low, interval.high if math.isfinite(interval.high) else interval.value]
