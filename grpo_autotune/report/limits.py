"""Closeness of each stage to this machine's measured ceilings."""

from __future__ import annotations

import math

from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.cost import facts_from_records, limit_seconds, stage_work
from grpo_autotune.estimate.passes import Work
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.hardware import Ceilings
from grpo_autotune.probe.breakdown import Breakdown, Limit
from grpo_autotune.records.probe import ProbeRecord

_PASSES = ("policy_logprob", "reference_logprob", "backward")
WORK_LEFT_OUT = {
    "shared_prefix": _PASSES,
    "skip_dead": _PASSES,
    "vision_cache": (*_PASSES, "generation"),
    "shared_prefill": ("generation",),
}
"""Speed-up -> stages in which it computes less than the count of plain TRL's work, which then tells no limit."""


def limits_of(record: ProbeRecord, breakdown: Breakdown, ceilings: Ceilings | None) -> dict[str, Limit]:
    """Each stage's share of its limit; empty without ceilings, without token counts, for a model whose shape the
    formulas do not describe (a mixture of experts, an unknown vision tower), and for stages whose work a speed-up
    leaves out."""
    if ceilings is None or record.tokens is None:
        return {}
    try:
        shape = ModelShape.from_config(record.trainer.model_config_json)
    except ConfigError:
        return {}
    seen = ("policy_logprob", "old_policy") in breakdown.parts_s
    facts = facts_from_records(shape, record.trainer, record.tokens, record.images, old_policy=seen)
    shared = {stage for name in record.trainer.speedups for stage in WORK_LEFT_OUT.get(name, ())}
    limits = {
        stage: limit_of(work, breakdown.seconds(stage), ceilings)
        for stage, work in stage_work(shape, facts).items()
        if stage not in shared
    }
    return {stage: limit for stage, limit in limits.items() if limit is not None}


def limit_of(work: Work, spent_s: float, ceilings: Ceilings) -> Limit | None:
    """Share of the limit, and the ceiling to which most of the least time is due; None without time or work.

    Both ceilings are measured, so work that stays in a cache can pass the one on memory; the share is then 1.
    """
    matrix, memory = ceilings.matrix_flops_s, ceilings.memory_bytes_s
    least_s = limit_seconds(work, matrix, memory)
    if spent_s <= 0.0 or least_s <= 0.0:
        return None
    matrix_s = math.fsum(flops / matrix for flops, moved in work.phases if flops / matrix >= moved / memory)
    return Limit(min(1.0, least_s / spent_s), "matrix" if matrix_s >= least_s / 2.0 else "memory")
