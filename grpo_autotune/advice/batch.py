"""The key that keeps the generation batch in step with a change of micro batch or accumulation."""

from __future__ import annotations

from grpo_autotune.advice.facts import Facts
from grpo_autotune.records.report import Change


def generation_changes(facts: Facts, *, fewer_steps: int, fewer_rows: int = 1) -> tuple[Change, ...]:
    """What else to set when a generation is to serve `fewer_steps` times fewer micro steps, and hold `fewer_rows` times
    fewer completions.

    TRL takes `generation_batch_size` or `steps_per_generation`, not both, derives each from the other, and takes
    `steps_per_generation` from `gradient_accumulation_steps` where neither is given. So the one that the user gave is
    the one to change. Without a configuration to look at, `steps_per_generation` is taken to be given where it differs
    from the accumulation.
    """
    t = facts.record.trainer
    if facts.setting("grpo", "generation_batch_size") is not None:
        now = t.generation_batch_size
        key, after = "grpo.generation_batch_size", now // fewer_rows
        return (Change(key=key, before=now, after=after),) if fewer_rows > 1 else ()
    given = facts.setting("grpo", "steps_per_generation") is not None
    if not given and t.steps_per_generation == t.gradient_accumulation_steps:
        return ()
    now = t.steps_per_generation
    return (Change(key="grpo.steps_per_generation", before=now, after=now // fewer_steps),)
