"""Features of each stage's seconds: calls that cost a fixed time each, and work that costs time in proportion.

A feature is a count per optimizer step; a stage's seconds are a sum of features times non-negative coefficients, which
`regression` finds. Work is counted by `estimate.passes` in operations, bytes at the machine's own exchange rate.
"""

from collections.abc import Callable
from typing import NamedTuple

from grpo_autotune.estimate.cost import generation_work, training_batch
from grpo_autotune.estimate.passes import Work, backward, forward
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.predict.speedups import tower_is_kept
from grpo_autotune.predict.workload import Workload

Features = dict[str, float]

PARTS = {
    "generation": "generation", "training_forward": "policy_logprob", "old_policy": "policy_logprob",
    "reference_logprob": "reference_logprob", "backward": "backward", "optimizer": "optimizer", "data": "data",
    "prompt": "prompt", "tools": "tools", "reward": "reward", "weight_sync": "weight_sync", "engine": "engine",
    "sync_wait": "sync_wait", "collectives": "sync_wait", "log_save_eval": "log_save_eval", "other": "other",
}  # fmt: skip
"""What is predicted by itself -> the stage that holds it; stages are those of the probe."""

IMAGE_PIXELS, IMAGE_TOKENS = 224.0**2, 49.0
"""Pixels and tokens that cost what an image costs whatever its size, in reading and in processing it: measured on the
demo at 32, 64 and 96 pixels."""
SPARED = "_spared"
"""Ends the feature of operations that a speed-up leaves out."""


class Rates(NamedTuple):
    """Operations that the machine does in the time it moves a byte; only this exchange rate matters here."""

    flops_per_byte: float


def features(load: Workload, rates: Rates) -> dict[str, Features]:
    """Features of every part that runs, by the names of `PARTS`."""
    return {part: counts for part, make in MAKERS.items() if (counts := make(load, rates)) is not None}


def _generation(load: Workload, rates: Rates) -> Features:
    facts, suffix = load.facts, "@vllm" if load.facts.use_vllm else ""
    steps = max(facts.longest_completion - 1.0, 0.0) * load.generations * load.waves
    decoded = max(facts.completion_tokens - 1.0, 0.0) * load.generations if facts.use_vllm else steps
    counts = {"calls": load.generations, "steps": steps}
    if load.shape is None:
        tokens = facts.generation_rows * facts.prompt_tokens * load.generations
        counts |= {"prompt_tokens": tokens, "tokens": facts.generation_rows * decoded}
    else:
        *prefill, decode = generation_work(load.shape, facts).phases
        counts |= _named(Work(tuple(prefill)), ("tower", "text", "head"), rates)
        counts |= _work("decode", decode, rates)
        counts |= _spared(load, counts, "shared_prefill", facts.group, 0.0)
    return {f"{name}{suffix}": count for name, count in counts.items()}


def _pass(
    load: Workload, rates: Rates, passes: float, copies: float, *, adapters: bool = True, merged: float = 1.0
) -> Features:
    """`copies`: rows of one prompt that a speed-up finds together. A training pass has those of its `merged` micro
    batches, a pass without gradients goes over the whole generation (`_rows` in speedups/shared_prefix/speedup.py)."""
    facts = load.facts
    counts = {"calls": passes / merged, "rows": passes * facts.micro_batch}
    if load.shape is None:
        return counts | _plain(load, passes)
    one = forward(load.shape, training_batch(load.shape, facts), facts.training, adapters=adapters)
    counts |= _named(one * passes, ("tower", "text", "head"), rates) | _scores(load, load.shape, passes)
    return counts | _spared(load, counts, "shared_prefix", copies, facts.completion_tokens)


def _copies_together(load: Workload) -> float:
    """Rows of one prompt in a training pass."""
    return min(load.facts.group, load.facts.micro_batch * load.merged)


def _old_policy(load: Workload, rates: Rates) -> Features | None:
    facts = load.facts
    return _pass(load, rates, facts.passes / facts.iterations, facts.group) if facts.old_policy else None


def _reference(load: Workload, rates: Rates) -> Features | None:
    facts = load.facts
    passes = facts.passes / facts.iterations
    return _pass(load, rates, passes, facts.group, adapters=False) if facts.reference else None


def _backward(load: Workload, rates: Rates) -> Features:
    facts = load.facts
    counts = {"calls": facts.passes / load.merged, "rows": float(facts.passes * facts.micro_batch)}
    if facts.training.checkpointing:
        counts["calls_again"] = facts.passes / load.merged
    if load.shape is None:
        return counts | _plain(load, facts.passes * (1.5 if facts.training.checkpointing else 1.0))
    work = backward(load.shape, training_batch(load.shape, facts), facts.training) * facts.passes
    head, text, *rest = work.phases
    counts |= _work("head", head, rates) | _work("text", text, rates)
    if len(rest) > 1:
        counts |= _work("tower", rest[0], rates)
    counts |= _scores(load, load.shape, facts.passes)
    return counts | _spared(load, counts, "shared_prefix", _copies_together(load), facts.completion_tokens)


def _spared(load: Workload, counts: Features, by: str, copies: float, completion: float) -> Features:
    """Under the speed-up `by`, operations with each prompt and its images counted once for its `copies` in a pass, and
    those that are spared beside them: what becomes of these is for the fit to find out."""
    if by not in load.speedups:
        return {}
    prompt = load.facts.prompt_tokens
    text = (prompt / copies + completion) / max(prompt + completion, 1.0)
    shares = {"text_flops": text, "tower_flops": 0.0 if tower_is_kept(load.facts, load.speedups) else 1.0 / copies}
    done = {name: counts[name] * share for name, share in shares.items() if name in counts}
    return done | {f"{name}{SPARED}": counts[name] - count for name, count in done.items()}


def _plain(load: Workload, passes: float) -> Features:
    """Tokens and pairs of tokens, for an architecture without formulas."""
    facts = load.facts
    tokens = passes * facts.micro_batch * facts.row_tokens
    return {"tokens": tokens, "pairs": tokens * facts.row_tokens}


def _scores(load: Workload, shape: ModelShape, passes: float) -> Features:
    """Attention scores written and read, where the kernel does: `eager` alone, in the tower too."""
    if not load.sizes.eager:
        return {}
    facts = load.facts
    batch = training_batch(shape, facts)
    text = shape.layers * shape.heads * batch.rows * batch.length**2
    tower = 0.0
    if shape.vision is not None:
        tower = shape.vision.depth * shape.vision.heads * batch.patches * batch.grid[0] * batch.grid[1]
    return {"attention_scores": (text + tower) * passes}


def _sync_wait(load: Workload, rates: Rates) -> Features:
    """One rank pays for the calls; several wait for work that differs, however a step is split into calls."""
    return {"calls": float(load.facts.passes) if load.trainer.world_size == 1 else 1.0}


def _collectives(load: Workload, rates: Rates) -> Features | None:
    """Several ranks reduce gradients, and those that share a model send its parts."""
    return (
        {"calls": 1.0} | ({"sent": load.sent["collectives"]} if load.sent else {})
        if load.trainer.world_size > 1
        else None
    )


def _data(load: Workload, rates: Rates) -> Features:
    rows, suffix = load.rows_loaded, "@workers" if load.trainer.dataloader_num_workers else ""
    pixels = rows * load.facts.images * (load.pixels + IMAGE_PIXELS)
    counts = {"calls": float(load.facts.passes), "rows": rows, "pixels": pixels}
    return {f"{name}{suffix}": count for name, count in counts.items()}


def _prompt(load: Workload, rates: Rates) -> Features:
    rows = load.facts.generation_rows * load.generations
    tokens = rows * load.facts.images * (load.facts.image_tokens + IMAGE_TOKENS)
    pixels = rows * load.facts.images * (load.pixels + IMAGE_PIXELS)
    return {"calls": load.generations, "rows": rows, "image_tokens": tokens, "pixels": pixels}


def _reward(load: Workload, rates: Rates) -> Features:
    rows = load.facts.generation_rows * load.generations
    return {"calls": load.generations, "rows": rows, "tokens": rows * load.facts.completion_tokens}


def _other(load: Workload, rates: Rates) -> Features:
    rows = load.facts.generation_rows * load.generations
    patches = rows * load.facts.images * load.facts.image_tokens
    return {"calls": 1.0, "passes": float(load.facts.passes), "rows": rows, "image_tokens": patches}


MAKERS: dict[str, Callable[[Workload, Rates], Features | None]] = {
    "generation": _generation,
    "training_forward": lambda load, rates: _pass(
        load, rates, load.facts.passes, _copies_together(load), merged=load.merged
    ),
    "old_policy": _old_policy,
    "reference_logprob": _reference,
    "backward": _backward,
    "optimizer": lambda load, rates: {"calls": 1.0, "parameters": load.facts.training.trainable},
    "data": _data,
    "prompt": _prompt,
    "tools": _reward,
    "reward": _reward,
    "weight_sync": lambda load, rates: {"calls": load.generations},
    "engine": lambda load, rates: {"calls": load.generations} if load.wakes else None,
    "sync_wait": _sync_wait,
    "collectives": _collectives,
    "log_save_eval": lambda load, rates: {"calls": 1.0},
    "other": _other,
}


def _named(work: Work, names: tuple[str, ...], rates: Rates) -> Features:
    """Phases of a pass, the last of `names` belonging to the last phase."""
    counts: Features = {}
    for name, phase in zip(names[-len(work.phases) :], work.phases, strict=True):
        counts |= _work(name, phase, rates)
    return counts


def _work(name: str, phase: tuple[float, float], rates: Rates) -> Features:
    flops, moved = phase
    return {f"{name}_flops": flops, f"{name}_bytes": moved * rates.flops_per_byte}
