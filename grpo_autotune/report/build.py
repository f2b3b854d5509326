"""From a probe's record to a report: pure arithmetic on what was measured."""

import statistics

from grpo_autotune.advice.bound import bound, warnings
from grpo_autotune.advice.facts import Facts
from grpo_autotune.advice.judge import judge
from grpo_autotune.advice.observed import stragglers
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Ceilings, Machine
from grpo_autotune.predict.objective import run_steps, useful_completions
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.probe import ProbeRecord, RankTimings, StageRow, cycle_means, seconds_once
from grpo_autotune.records.report import PartRow, RankRow, Ranks, RankStage, Rates, Report, StageReport
from grpo_autotune.records.rewards import RemoteCalls
from grpo_autotune.report.limits import limits_of
from grpo_autotune.report.metrics import flat_metrics
from grpo_autotune.units import percent

STRAGGLER_SHARE = 0.05
"""A rank is named when it works longer than the others' mean by this share of the step."""
AS_MEASURED = (
    *("fidelity", "engine", "startup", "images", "tokens", "profiled", "others", "rewards", "weight_sync_bytes"),
    *("rank", "trainer", "versions", "runtime", "resample", "living_shares"),
)
"""Fields of a report that are the record's."""
TRAINED = ("policy_logprob", "backward", "optimizer")
"""Stages whose work follows the tokens trained on: each generated token `num_iterations` times."""


def build_report(
    record: ProbeRecord,
    machine: Machine | None = None,
    ceilings: Ceilings | None = None,
    config: RunConfig | None = None,
) -> Report:
    """Account for a probe, judge it, and put everything a reader needs beside it; NothingSucceeded where no optimizer
    step was measured. Without the machine, advice that needs its memory or cores is left out; without its measured
    ceilings there is no `limit_share`. A trainer that somebody else built has no configuration."""
    breakdown = break_down(record.timings)
    return report_of_facts(Facts(record, breakdown, limits_of(record, breakdown, ceilings), machine, config))


def report_of_facts(facts: Facts) -> Report:
    """The report of facts that are already accounted for."""
    record, b = facts.record, facts.breakdown
    return Report(
        **{name: getattr(record, name) for name in AS_MEASURED},
        step_s=b.step_s,
        step_spread_s=b.step_spread_s,
        steps=record.timings.steps,
        step_seconds=record.timings.step_s,
        warmup_s=record.timings.warmup_s,
        cycle=record.timings.cycle,
        slowest=b.slowest,
        slow_steps=b.slow_steps,
        stages=[_stage(row, facts) for row in record.timings.stages],
        bound=bound(facts),
        verdict=judge(facts),
        warnings=warnings(facts),
        occasions=seconds_once(record),
        rates=_rates(facts),
        remote=[_per_step(one, facts) for one in record.remote],
        ranks=_ranks(record.ranks, b.step_s),
        metrics=flat_metrics(record, b),
        machine=facts.machine.model_dump(mode="json") if facts.machine is not None else None,
        config=facts.config.model_dump(mode="json") if facts.config is not None else None,
    )


def _stage(row: StageRow, facts: Facts) -> StageReport:
    b, limit = facts.breakdown, facts.limits.get(row.name)
    self_s = b.self_s[row.name]
    return StageReport(
        name=row.name,
        self_s=self_s,
        mean_s=b.mean_s[row.name],
        host_s=statistics.fmean(cycle_means(row.host_s, facts.record.timings.cycle)) if row.host_s else None,
        share=b.shares[row.name],
        spread=b.spread_s[row.name],
        per_step_s=[round(spent, 6) for spent in row.per_step_s] if any(row.per_step_s) else [],
        ms_per_token=_ms_per_token(row.name, self_s, facts.record),
        limit_share=limit.share if limit else None,
        limited_by=limit.by if limit else None,
        peak_bytes=row.peak_bytes,
        hidden_s=row.hidden_s,
        calls=row.calls,
        parts=[
            PartRow(name=part, self_s=b.parts_s[row.name, part], share=b.parts_s[row.name, part] / b.step_s)
            for part in row.parts
        ],
        seams=row.seams,
        utilisation=next((u for u in facts.record.utilisation if u.stage == row.name), None),
    )


def _ms_per_token(stage: str, self_s: float, record: ProbeRecord) -> float | None:
    """Milliseconds per completion token for generation, per token trained on for `TRAINED`, per token of prompt and
    completion elsewhere; a step trains on `num_iterations` times the tokens that are generated a step."""
    tokens = record.tokens
    if tokens is None:
        return None
    count = tokens.completion_per_step + (0.0 if stage == "generation" else tokens.prompt_per_step)
    count *= record.trainer.num_iterations if stage in TRAINED else 1
    return self_s * 1000.0 / count if count > 0.0 else None


def _rates(facts: Facts) -> Rates | None:
    """Work per second over all ranks. Token counts are one rank's, and the ranks' batches are equally large."""
    tokens, t, step_s = facts.record.tokens, facts.record.trainer, facts.breakdown.step_s
    if tokens is None:
        return None
    dead = facts.dead_share()
    masked = tokens.truncated_share if t.mask_truncated_completions else 0.0
    groups = t.rows / (t.num_iterations * t.num_generations)
    useful = None if dead is None else useful_completions(groups, t.num_generations, 1.0 - dead, masked) / step_s
    cut = f"{percent(masked)} of the completions were cut off and masked"
    completion = tokens.completion_per_step * t.world_size / step_s
    return Rates(
        tokens_per_s=tokens.prompt_per_step * t.world_size / step_s + completion,
        completion_tokens_per_s=completion,
        useful_completions_per_s=useful,
        useless=None if useful != 0.0 else "each group's rewards were equal" if dead == 1.0 else cut,
    )


def _per_step(one: RemoteCalls, facts: Facts) -> RemoteCalls:
    """A row is scored once in `num_iterations` steps, and dynamic sampling has more rows scored than trained on; a cost
    per row holds whatever ranks and evaluations asked."""
    t, r = facts.record.trainer, facts.record.resample
    steps = run_steps(facts.config, t.train_rows) if facts.config is not None else None
    parts = {"calls": one.calls, "tokens": one.tokens_in + one.tokens_out, "cost": one.cost}
    scale = t.rows / t.num_iterations / max(1, one.rows) * (r.rounds / r.rollouts if r and r.rollouts else 1.0)
    per_step = {f"{name}_per_step": None if n is None else n * scale for name, n in parts.items()}
    whole = None if steps is None or one.cost is None else one.cost * scale * steps
    return one.model_copy(update={**per_step, "cost_per_run": whole})


def _ranks(rows: list[RankTimings], step_s: float) -> Ranks | None:
    """Mean and slowest rank of each stage, and work and wait of each rank; None for a run of one."""
    if len(rows) < 2:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.stages))
    by_stage = {"step": {row.rank: row.step_s for row in rows}}
    by_stage |= {name: {row.rank: row.stages.get(name, 0.0) for row in rows} for name in names}
    stages = []
    for name, spent in by_stage.items():
        slowest = max(spent, key=lambda rank: spent[rank])
        mean_s = statistics.fmean(spent.values())
        stages.append(RankStage(name=name, mean_s=mean_s, slowest_s=spent[slowest], slowest_rank=slowest))
    named = [one for one, _ in stragglers(rows) if one.extra_s > STRAGGLER_SHARE * step_s]
    waits = [(row, row.stages.get("sync_wait", 0.0)) for row in rows]
    each = [RankRow(rank=row.rank, step_s=row.step_s, compute_s=row.step_s - s, wait_s=s) for row, s in waits]
    return Ranks(world_size=len(rows), stages=stages, rows=each, stragglers=named)
