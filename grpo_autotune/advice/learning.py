"""Rules whose advice changes what is learned: each says so, and the user decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grpo_autotune.advice.batch import generation_changes
from grpo_autotune.advice.facts import PASSES, Facts, Idea
from grpo_autotune.records.report import Change
from grpo_autotune.units import amount, percent, seconds

ROW_STAGES = (*PASSES, "generation", "prompt", "reward")
MANY_DEAD = 0.3
MANY_TRUNCATED = 0.2
ENGINE_LIMIT_SHARE = 0.5


def image_size(facts: Facts) -> Idea | None:
    """Smaller images mean fewer tokens: an image's tokens go with the square of its longest side.

    The passes over the whole sequence (log-probs, backward, and the prefill inside `generate`, which is taken to cost
    one training forward) are assumed to be linear in the tokens of a row, which is cautious: attention is quadratic.
    Decoding, vLLM's cached prefill, rewards and data stay as they are. Among the sizes for which the processor was
    asked, the largest that at least halves an image's tokens is proposed; failing that, the configured size divided
    by the square root of 2.
    """
    images, tokens = facts.record.images, facts.record.tokens
    if images is None or images.tokens is None or tokens is None:
        return None
    old_tokens = images.tokens.mean
    target = _smaller(facts, old_tokens, images.tokens_at)
    if target is None:
        return None
    side, new_tokens = target
    row = tokens.prompt.mean + tokens.completion.mean
    fewer = images.per_prompt * (old_tokens - new_tokens) / row
    forward_s = facts.part_s("policy_logprob", "training_forward")
    prefill_s = 0.0 if facts.record.trainer.use_vllm else min(facts.breakdown.seconds("generation"), forward_s)
    return Idea(
        kind="learning",
        stages=(*PASSES, "generation"),
        changes=(Change(key="data.image_size", before=facts.setting("data", "image_size"), after=side),),
        saving_s=fewer * (facts.breakdown.seconds(*PASSES) + prefill_s),
        because=f"An image would take {amount(new_tokens)} tokens instead of {amount(old_tokens)}, so that a "
        "row of "
        f"{amount(row)} tokens gets {percent(fewer)} shorter; log-probs, backward and prefill are assumed to follow",
        caveat="It changes learning: check that what the question asks for can still be seen at that size",
    )


def oversized_images(facts: Facts) -> Idea | None:
    """Images larger than what the model sees are shrunk by the processor at every step; once is enough.

    The model sees tokens * (patch * merge)^2 pixels. Reading and shrinking cost about the pixels read, so resizing
    the data set once saves 1 - seen / read of the prompt stage.
    """
    images, vision = facts.record.images, facts.record.trainer.model_config_json.get("vision_config") or {}
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    if images is None or images.tokens is None or not patch or not merge:
        return None
    seen = images.tokens.mean * (patch * merge) ** 2
    if seen > 0.7 * images.pixels.mean:
        return None
    side = int(math.sqrt(seen))
    return Idea(
        kind="learning",
        stages=("prompt",),
        changes=(Change(key="data.image_size", before=facts.setting("data", "image_size"), after=side),),
        saving_s=facts.breakdown.seconds("prompt") * (1.0 - seen / images.pixels.mean),
        because=f"The images hold {amount(images.pixels.mean)} pixels, of which the processor leaves {amount(seen)} "
        "to the "
        "model, each time anew; the time is assumed to follow the pixels read. (The side is that of a square image)",
        caveat="It changes learning a little: the pixels come out of another resampling",
    )


def no_reference(facts: Facts) -> Idea | None:
    """With `beta` 0 there is no KL term, and the reference pass is not made at all."""
    beta = facts.record.trainer.beta
    if beta == 0.0:
        return None
    return Idea(
        kind="learning",
        stages=("reference_logprob",),
        changes=(Change(key="grpo.beta", before=beta, after=0.0),),
        saving_s=facts.breakdown.seconds("reference_logprob"),
        because="Without the KL term no reference log-probs are computed",
        caveat="It changes learning: nothing holds the policy near the model it started from; TRL's own default is 0",
    )


def fewer_generations(facts: Facts) -> Idea | None:
    """Half the completions a prompt, with as many prompts a step, halves the work on rows.

    All stages that work on rows are assumed to halve, except generation where it is bound by memory: reading the
    weights costs the same for half the rows. Proposed only if the useful completions a second, (G - 1) * [rewards
    differ] summed over groups, are predicted to fall by a tenth at most: a smaller group has fewer degrees of freedom
    and is dead oftener.
    """
    t, tokens = facts.record.trainer, facts.record.tokens
    half = t.num_generations // 2
    even = t.num_generations % 2 == t.gradient_accumulation_steps % 2 == t.steps_per_generation % 2 == 0
    if tokens is None or half < 2 or not even or not tokens.pass_rates:
        return None
    limit = facts.limits.get("generation")
    stages = tuple(s for s in ROW_STAGES if not (s == "generation" and limit is not None and limit.by == "memory"))
    step_s, saving = facts.breakdown.step_s, facts.breakdown.seconds(*stages) / 2.0
    now, then = (living_share(tokens.pass_rates, t.num_generations, g) for g in (t.num_generations, half))
    worth = (then * (half - 1) / (step_s - saving)) / max(1e-12, now * (t.num_generations - 1) / step_s)
    if now <= 0.0 or worth < 0.9:
        return None
    return Idea(
        kind="learning",
        stages=stages,
        changes=(
            Change(key="grpo.num_generations", before=t.num_generations, after=half),
            Change(
                key="grpo.gradient_accumulation_steps",
                before=t.gradient_accumulation_steps,
                after=t.gradient_accumulation_steps // 2,
            ),
            *generation_changes(facts, fewer_steps=2, fewer_rows=2),
        ),
        saving_s=saving,
        because="The same prompts with half the completions; work on rows is assumed to halve",
        caveat=f"It changes learning: groups without reward spread are predicted to go from {percent(1 - now)} to "
        f"{percent(1 - then)}, and useful completions a second to {percent(worth)} of now",
    )


def long_tail(facts: Facts) -> Idea | None:
    """A few long completions make all others wait (`generate`) and be padded (every pass over the batch).

    Capping completions at the 90th percentile c of a longest m cuts `generate`, which runs until the last row has
    ended, to c / m, and the passes' grid of longest prompt p plus longest completion to (p + c) / (p + m). Assumed:
    every batch holds a completion near the longest. Silent while c > 0.6 m.
    """
    tokens, t = facts.record.tokens, facts.record.trainer
    if tokens is None or tokens.completion.p90 > 0.6 * tokens.completion.max:
        return None
    longest, cap = tokens.completion.max, float(8 * math.ceil(tokens.completion.p90 / 8))
    decode_s = 0.0 if t.use_vllm else facts.breakdown.seconds("generation")
    passes_s = facts.breakdown.seconds(*PASSES)
    saving = decode_s * (1.0 - cap / longest) + passes_s * (longest - cap) / (tokens.prompt.max + longest)
    return Idea(
        kind="learning",
        stages=(*PASSES,) if t.use_vllm else (*PASSES, "generation"),
        changes=(Change(key="grpo.max_completion_length", before=t.max_completion_length, after=int(cap)),),
        saving_s=saving,
        because=f"Nine of ten completions have at most {amount(tokens.completion.p90)} tokens, the longest "
        f"{amount(longest)}, and the whole batch is padded to it; {percent(tokens.padding_share)} of the log-prob "
        "passes is "
        "padding. It is assumed that every batch holds one such completion",
        caveat="It changes learning: about a tenth of the completions would be cut off",
    )


def use_vllm(facts: Facts) -> Idea | None:
    """vLLM decodes in larger batches and fewer kernels than `generate`.

    Decoding is bound by memory bandwidth. If `generate` reaches a share L of the ceiling, an engine that reaches half
    of it (`ENGINE_LIMIT_SHARE`, an assumption) takes L / 0.5 of the time. From it comes the old-policy pass that TRL
    then always makes, which costs a training forward.
    """
    t, limit = facts.record.trainer, facts.limits.get("generation")
    if t.use_vllm or not facts.on_gpu or limit is None:
        return None
    extra_s = (
        facts.part_s("policy_logprob", "training_forward") if not facts.part_s("policy_logprob", "old_policy") else 0.0
    )
    faster_s = facts.breakdown.seconds("generation") * (1.0 - limit.share / ENGINE_LIMIT_SHARE)
    return Idea(
        kind="learning",
        stages=("generation",),
        changes=(Change(key="grpo.use_vllm", before=False, after=True),),
        saving_s=faster_s - extra_s,
        because=f"`generate` runs at {percent(limit.share)} of what this GPU can do; vLLM is assumed to reach "
        f"{percent(ENGINE_LIMIT_SHARE)}" + (f", less {seconds(extra_s)} for one more log-prob pass" if extra_s else ""),
        caveat="It changes learning a little: another engine samples, and TRL weighs samples by the difference; "
        "probe again and read the fidelity line",
    )


def truncated(facts: Facts) -> Idea | None:
    """A completion that was cut off was paid for and can seldom be right; no seconds are saved by letting it end."""
    tokens, t = facts.record.tokens, facts.record.trainer
    if tokens is None or tokens.truncated_share < MANY_TRUNCATED:
        return None
    return Idea(
        kind="learning",
        stages=("generation",),
        changes=(
            Change(key="grpo.max_completion_length", before=t.max_completion_length, after=2 * t.max_completion_length),
        ),
        because=f"{percent(tokens.truncated_share)} of the completions were cut off before they ended. Generation is "
        "predicted "
        f"to take up to {seconds(facts.breakdown.seconds('generation'))} more of a step",
        caveat="It changes learning. A model that never ends its answers needs a prompt or a reward for short ones "
        "instead",
    )


def dead_groups(facts: Facts) -> Idea | None:
    """A group of equal rewards has no advantage and teaches nothing, whatever it cost.

    Where no rewards differed at all, no key helps. Else, with the completions of a step kept, groups of 2G instead of
    G are alive more often (`living_share`); silent if the useful completions, living * (G - 1) / G, are not predicted
    to grow.
    """
    dead, t, tokens = facts.dead_share(), facts.record.trainer, facts.record.tokens
    if dead is None or tokens is None or dead < MANY_DEAD:
        return None
    seen = f"{tokens.dead_groups} of {tokens.groups} groups had equal rewards and taught nothing"
    if dead >= 1.0:
        return Idea(
            kind="learning",
            stages=ROW_STAGES,
            action="check the rewards, or start from a model that sometimes succeeds",
            because=f"{seen}: at beta 0 such a step has no gradient at all",
        )
    g = t.num_generations
    now, then = living_share(tokens.pass_rates, g, g), living_share(tokens.pass_rates, g, 2 * g)
    if t.generation_batch_size % (2 * g) or then * (2 * g - 1) / (2 * g) <= now * (g - 1) / g:
        return None
    return Idea(
        kind="learning",
        stages=ROW_STAGES,
        changes=(Change(key="grpo.num_generations", before=g, after=2 * g),),
        because=f"{seen}, {percent(dead)} of the work. Groups of {2 * g}, half as many in a batch, are predicted to "
        "be without "
        f"spread in {percent(1 - then)} of cases, if each prompt's chance is as seen here",
        caveat="It changes learning: fewer prompts a step. Leaving out prompts that always or never succeed helps as "
        "well",
    )


RULES = (image_size, oversized_images, no_reference, fewer_generations, long_tail, use_vllm, truncated, dead_groups)


def living_share(pass_rates: Sequence[float], seen: int, generations: int) -> float:
    """Share of groups of `generations` whose rewards are predicted to differ: mean over prompts of 1 - p^G - (1 - p)^G.

    A prompt's chance p is estimated from its `seen` completions with half a success and half a failure added (Jeffreys'
    prior), since a prompt that failed eight times of eight does not fail always.
    """
    if not pass_rates:
        return 0.0
    chances = [(rate * seen + 0.5) / (seen + 1.0) for rate in pass_rates]
    return math.fsum(1.0 - p**generations - (1.0 - p) ** generations for p in chances) / len(chances)


def _smaller(facts: Facts, old_tokens: float, tokens_at: Mapping[str, float]) -> tuple[int, float] | None:
    """Longest side to propose and an image's tokens at it."""
    enough = {int(side): count for side, count in tokens_at.items() if 0 < count <= old_tokens / 2.0}
    if enough:
        return max(enough.items())
    now = facts.setting("data", "image_size")
    vision = facts.record.trainer.model_config_json.get("vision_config") or {}
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    if not isinstance(now, int) or not patch or not merge:
        return None
    unit = int(patch) * int(merge)
    side = max(unit, int(now / math.sqrt(2.0)) // unit * unit)
    return (side, old_tokens * (side / now) ** 2) if side < now else None
