"""Closeness of each stage to this machine's measured ceilings."""

import math
from dataclasses import replace
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.cost import WorkFacts, facts_from_records, limit_seconds, stage_work
from grpo_autotune.estimate.passes import Work
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.hardware import Ceilings
from grpo_autotune.probe.breakdown import Breakdown, Limit
from grpo_autotune.records.probe import TRAINED, ProbeRecord

_PASSES = ("policy_logprob", "reference_logprob", "backward")
WORK_LEFT_OUT = {
    "shared_prefix": _PASSES,
    "skip_dead": _PASSES,
    "vision_cache": (*_PASSES, "generation"),
    "shared_prefill": ("generation",),
    "merge_for_generation": ("generation",),
}
"""Speed-up -> stages in which it computes less than plain TRL; how much less is in its own counts."""


def limits_of(record: ProbeRecord, breakdown: Breakdown, ceilings: Ceilings | None) -> dict[str, Limit]:
    """Each stage's share of its limit; empty without ceilings, without token counts, for a model whose shape the
    formulas do not describe (a mixture of experts, an unknown vision tower), and for stages whose work a speed-up
    leaves out without having counted it."""
    if ceilings is None or record.tokens is None:
        return {}
    try:
        shape = ModelShape.from_config(record.trainer.model_config_json)
    except ConfigError:
        return {}
    seen = ("policy_logprob", "old_policy") in breakdown.parts_s
    facts = facts_from_records(shape, record.trainer, record.tokens, record.images, old_policy=seen)
    facts = replace(facts, **shares_of(record, facts))
    uncounted = set(record.trainer.speedups) - record.speedups.keys()
    unknown = {stage for name in uncounted for stage in WORK_LEFT_OUT.get(name, ())}
    living = 1.0 if record.living_share is None else record.living_share
    limits = {
        stage: limit_of(work * living if stage in TRAINED else work, breakdown.seconds(stage), ceilings)
        for stage, work in stage_work(shape, facts).items()
        if stage not in unknown
    }
    return {stage: limit for stage, limit in limits.items() if limit is not None}


def shares_of(record: ProbeRecord, facts: WorkFacts) -> dict[str, Any]:
    """Fields of `WorkFacts` by what the speed-ups that are on counted; a shared pass projects scored tokens alone, and
    its tower runs once for the rows of a group in it."""
    prefix = record.speedups.get("shared_prefix", {}) if "shared_prefix" in record.trainer.speedups else {}
    shared, plain = prefix.get("shared_passes", 0.0), prefix.get("plain_passes", 0.0)
    copies = min(facts.group, facts.micro_batch) if shared else 1
    spared = 1.0 - _share(record, "shared_prefix", "tokens", "tokens_of_plain")
    return {
        "tokens_share": 1.0 - spared * shared / max(1.0, shared + plain),
        "compact_head": facts.compact_head or copies > 1,
        "tower_share": _share(record, "vision_cache", "computed", "asked") / copies,
        "prefill_share": _share(record, "shared_prefill", "prompts", "rows"),
        "decode_share": _share(record, "shared_prefill", "row_steps", "row_steps_of_plain"),
    }


def _share(record: ProbeRecord, speedup: str, part: str, whole: str) -> float:
    """One of a speed-up's counts over another; 1 where it is off or has counted nothing."""
    counts = record.speedups.get(speedup, {}) if speedup in record.trainer.speedups else {}
    return counts.get(part, 0.0) / counts[whole] if counts.get(whole) else 1.0


def limit_of(work: Work, spent_s: float, ceilings: Ceilings) -> Limit | None:
    """Share of the limit, and the ceiling to which most of the least time is due; None without time or work. Both
    ceilings are measured, so work that stays in a cache can pass the one on memory; the share is then 1."""
    matrix, memory = ceilings.matrix_flops_s, ceilings.memory_bytes_s
    least_s = limit_seconds(work, matrix, memory)
    if spent_s <= 0.0 or least_s <= 0.0:
        return None
    matrix_s = math.fsum(flops / matrix for flops, moved in work.phases if flops / matrix >= moved / memory)
    return Limit(min(1.0, least_s / spent_s), "matrix" if matrix_s >= least_s / 2.0 else "memory")
