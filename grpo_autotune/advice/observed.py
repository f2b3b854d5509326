"""Advice that no knob of the table follows: a reward that waits, a rank that works longer than the others, logging and
evaluating too often.

Each saving comes from the probe's own seconds.
"""

import math
import statistics
from collections.abc import Sequence

from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.predict.objective import steps_between
from grpo_autotune.records.probe import STAGE_WORDS, RankTimings
from grpo_autotune.records.report import Change, Straggler
from grpo_autotune.units import percent, seconds

LARGE_SHARE = 0.1
"""Of a run, from which evaluations that no step held are worth a word."""
CADENCE_KEYS = {"log": "logging_steps", "save": "save_steps", "evaluate": "eval_steps"}


def waiting_reward(facts: Facts) -> Idea | None:
    """A plain reward function that waits (for a server, a sandbox) can wait for all completions at once.

    TRL awaits `async def` functions together. If the processor is busy for a share c of the reward stage, 1 - c of the
    plain functions' time is waiting; asked all at once, n completions wait as long as one, which saves 1 - 1/n of it.
    """
    plain = [call for call in facts.record.rewards if not call.is_async]
    everything = sum(call.calls * call.mean_s for call in facts.record.rewards)
    seen = [u for u in facts.record.utilisation if u.stage == "reward" and u.cpu_percent is not None]
    t = facts.record.trainer
    rows = t.per_device_train_batch_size * t.steps_per_generation
    if not plain or everything <= 0.0 or not seen or seen[0].samples < 3:
        return None
    computing = max(min(1.0, (seen[0].cpu_percent or 0.0) / 100.0), (seen[0].gpu_percent or 0.0) / 100.0)
    if computing > 0.5 or rows < 2:
        return None
    slowest = max(plain, key=lambda call: call.calls * call.mean_s)
    share = sum(call.calls * call.mean_s for call in plain) / everything
    return Idea(
        kind="exact",
        stages=("reward",),
        action=f"make the reward function {slowest.name} an `async def` that awaits all completions at once",
        saving_s=facts.breakdown.seconds("reward") * share * (1.0 - computing) * (1.0 - 1.0 / rows),
        because=f"It takes {seconds(slowest.mean_s)} per call, and the processor is busy for only {percent(computing)} "
        f"of the time: it waits. It is assumed that {rows} completions can wait at the same time",
    )


def straggler(facts: Facts) -> Idea | None:
    """A rank that works longer than the mean of the others makes all of them wait. Seen from another rank the
    difference comes out of its waiting, seen from the slowest out of the stage in which it is slower: no more can be
    saved."""
    slowest, in_stage_s = next(iter(stragglers(facts.record.ranks)), (None, 0.0))
    if slowest is None:
        return None
    stage = slowest.stage if slowest.rank == facts.record.rank else "sync_wait"
    return Idea(
        kind="exact",
        stages=(stage,),
        action=f"find out why rank {slowest.rank} is slower than the others",
        saving_s=min(slowest.extra_s, facts.breakdown.seconds(stage)),
        because=f"The other ranks wait for it; {seconds(in_stage_s)} per step of the difference is in "
        f"{STAGE_WORDS.get(slowest.stage, slowest.stage)}. Longer prompts or completions on that rank, or another "
        "process on its device, are the usual reasons",
    )


def log_save_eval(facts: Facts) -> Idea | None:
    """Doing the most expensive of logging, saving and evaluating half as often saves half of its seconds in a long run;
    see `_long_run_s`."""
    costs = {part: cost for part in CADENCE_KEYS if (cost := _long_run_s(facts, part)) is not None}
    part = max(costs, key=lambda name: costs[name][0], default=None)
    if part is None:
        return None
    (cost_s, every), key = costs[part], CADENCE_KEYS[part]
    known = _configured(facts, part) is not None
    verbs = {"log": "log", "save": "save checkpoints", "evaluate": "evaluate"}
    return Idea(
        kind="exact",
        stages=("log_save_eval",),
        changes=(Change(key=f"grpo.{key}", before=every, after=2 * every),) if known else (),
        action="" if known else f"{verbs[part]} half as often (`{key}`)",
        saving_s=min(cost_s / 2.0, facts.part_s("log_save_eval", part)),
        because=f"It takes {seconds(cost_s * every)} each time, which is {seconds(cost_s)} of a step where it happens "
        + (f"every {every} steps" if every > 1 else "at every step"),
    )


def unseen_evaluation(facts: Facts) -> Idea | None:
    """An evaluation that no measured step held and that takes much of a run, by one that was timed, else predicted."""
    base, rows = facts.config, facts.record.trainer.held_out_rows
    every = steps_between(base, "evaluate") if base is not None else None
    if base is None or every is None or not rows or facts.models is None or facts.part_s("log_save_eval", "evaluate"):
        return None
    timed = facts.record.occasions.get("evaluate")
    once_s, how = timed or facts.models.evaluation_s(base, rows).value, "timed apart" if timed else "predicted"
    share = once_s / (once_s + every * facts.breakdown.step_s)
    if share < LARGE_SHARE:
        return None
    seen = f"It takes {seconds(once_s)} each time ({how}) on {rows} rows, {percent(share)} of the run"
    faster = f"the run would be {1.0 / (1.0 - share / 2.0):.2f} times as fast. `grpo-autotune plan` tells more"
    changes = (Change(key="grpo.eval_steps", before=every, after=2 * every),)
    return Idea(kind="exact", stages=(), changes=changes, because=f"{seen}, and no measured step held it; {faster}")


RULES = (waiting_reward, straggler, log_save_eval, unseen_evaluation)


def _configured(facts: Facts, part: str) -> int | None:
    """Optimizer steps between two of `part` by the configuration; None where it gives no number of steps."""
    every = facts.grpo.get(CADENCE_KEYS[part])
    strategy = facts.grpo.get(CADENCE_KEYS[part].replace("_steps", "_strategy"))
    counted = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    return every if counted and strategy in (None, "steps") else None


def _long_run_s(facts: Facts, part: str) -> tuple[float, int] | None:
    """Seconds of a step that a part of `log_save_eval` takes in a long run, however many of it a short probe held, and
    the steps between two of it; None where none was measured or those are not known. They come from the configuration,
    or, for saving and evaluating, from the distance between the measured steps in which it happened."""
    timings = facts.record.timings
    row = next((row for row in timings.stages if row.name == "log_save_eval"), None)
    if row is None or part not in row.parts:
        return None
    every, is_log = _configured(facts, part), part == "log"  # there are microseconds of logging in every step
    spent = zip(timings.steps, row.parts[part], strict=True)
    times = [(step, s) for step, s in spent if (step % (every or 1) == 0 if is_log else s > 0.0)]
    if every is None and not is_log and len(times) > 1:
        every = round((times[-1][0] - times[0][0]) / (len(times) - 1))
    total_s = math.fsum(timings.step_s)
    if not times or not every or total_s <= 0.0:
        return None
    scale = facts.breakdown.step_s * len(timings.step_s) / total_s
    return math.fsum(s for _, s in times) / len(times) / every * scale, every


def stragglers(rows: Sequence[RankTimings]) -> list[tuple[Straggler, float]]:
    """Each rank by what it works longer than the mean of the others, the longest first, and the seconds of that in its
    stage; a rank's work is its step less `sync_wait`. Empty for fewer than two ranks."""
    longer = []
    for row in rows:
        others = [other for other in rows if other.rank != row.rank]
        stages = [stage for stage in row.stages if stage != "sync_wait"]
        if not others or not stages:
            continue
        extra = {s: row.stages[s] - statistics.fmean(other.stages.get(s, 0.0) for other in others) for s in stages}
        stage = max(extra, key=lambda name: extra[name])
        waits = statistics.fmean(other.stages.get("sync_wait", 0.0) for other in others)
        waits -= row.stages.get("sync_wait", 0.0)
        extra_s, waits_s = math.fsum(extra.values()), max(0.0, waits)
        longer.append((Straggler(rank=row.rank, extra_s=extra_s, stage=stage, others_wait_s=waits_s), extra[stage]))
    return sorted(longer, key=lambda one: -one[0].extra_s)
