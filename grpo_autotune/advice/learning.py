"""Advice that changes what is learned, at values that a measurement speaks for: each says so, and the user decides."""

import math
from typing import Any

from grpo_autotune.advice.facts import PASSES, Facts, Idea
from grpo_autotune.advice.logged import MANY_DEAD, MANY_TRUNCATED
from grpo_autotune.advice.neighbours import Neighbour, changes, neighbour
from grpo_autotune.advice.sentences import concerned, moves
from grpo_autotune.knobs import PROMPTS, context_of, knob
from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.predict.workload import tokens_at
from grpo_autotune.records.probe import NO_SIGNAL, SAVES_NOTHING
from grpo_autotune.records.report import Change
from grpo_autotune.units import amount, listing, percent, seconds

ROW_STAGES = (*PASSES, "generation", "prompt", "tools", "reward")
IMAGE_SIZE = "data.image_size"
LENGTH = "grpo.max_completion_length"
LORA_DROPOUT = "peft.lora_dropout"
LEAST_USEFUL = 0.9
"""Fewer generations are advised where useful completions per second are predicted to fall by a tenth at most."""
LEAST_SEEN = 0.7
"""Images are too large for the model where it sees less than this share of their pixels."""
GOOD_LIMIT = 0.5
"""Share of a ceiling above which another engine has little to win."""


def image_size(facts: Facts) -> Idea | None:
    """Smaller images mean fewer tokens: the largest side that at least halves an image's tokens."""
    images, tokens = facts.record.images, facts.record.tokens
    if facts.base is None or images is None or images.tokens is None or tokens is None:
        return None
    now, known = images.tokens.mean, context_of(facts.base, facts.machine, facts.record)
    sides = {side for side in knob(IMAGE_SIZE).values(known) if side is not None} | set(map(int, images.tokens_at))
    at = {side: tokens_at(side, facts.record, facts.base, {}) or now for side in sides}
    side = max((side for side, count in at.items() if count <= now / 2.0), default=None)
    near = neighbour(facts, {IMAGE_SIZE: side}) if side is not None else None
    if side is None or near is None:
        return None
    row = tokens.prompt.mean + tokens.completion.mean
    return _idea(
        facts,
        near,
        because=f"An image would take {amount(at[side])} tokens instead of {amount(now)}, so that a row of "
        f"{amount(row)} tokens gets {percent(images.per_prompt * (now - at[side]) / row)} shorter; stages are assumed "
        "to take time by their operations",
        caveat="It changes learning: check that what the question asks for can still be seen at that size",
    )


def oversized_images(facts: Facts) -> Idea | None:
    """Images larger than what the model sees, tokens * (patch * merge)^2 pixels, are shrunk anew at every step."""
    images, vision = facts.record.images, facts.record.trainer.model_config_json.get("vision_config") or {}
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    if images is None or images.tokens is None or not patch or not merge:
        return None
    seen = images.tokens.mean * (patch * merge) ** 2
    near = neighbour(facts, {IMAGE_SIZE: int(math.sqrt(seen))}) if seen <= LEAST_SEEN * images.pixels.mean else None
    if near is None:
        return None
    return _idea(
        facts,
        near,
        because=f"The images hold {amount(images.pixels.mean)} pixels, of which the processor leaves {amount(seen)} to "
        "the model, each time anew. (The side is that of a square image)",
        caveat="It changes learning a little: the pixels come out of another resampling",
    )


def fewer_generations(facts: Facts) -> Idea | None:
    """Half the completions per prompt with as many prompts per step, where useful completions per second keep up: a
    smaller group has fewer degrees of freedom and more often has equal rewards."""
    half = facts.record.trainer.num_generations // 2
    if facts.base is None or facts.living is None or half < 2:
        return None
    prompts = knob(PROMPTS).current(facts.base)
    near = neighbour(facts, {GROUP: half, PROMPTS: prompts}) if prompts is not None else None
    if near is None or near.useful_ratio < LEAST_USEFUL:
        return None
    now, then = (facts.living.share(size) for size in (facts.record.trainer.num_generations, half))
    return _idea(
        facts,
        near,
        because="The same prompts with half the completions",
        caveat=f"It changes learning: groups without reward spread are predicted to go from {percent(1 - now)} to "
        f"{percent(1 - then)}, and useful completions per second to {percent(near.useful_ratio)} of now",
    )


def long_tail(facts: Facts) -> Idea | None:
    """A few long completions make all others wait (`generate`) and be padded (every pass over the batch): a cap at the
    90th percentile, where that is below 0.6 of the longest."""
    tokens = facts.record.tokens
    if tokens is None or tokens.completion.p90 > 0.6 * tokens.completion.max:
        return None
    near = neighbour(facts, {LENGTH: 8 * math.ceil(tokens.completion.p90 / 8)})
    if near is None:
        return None
    return _idea(
        facts,
        near,
        because=f"Nine of ten completions have at most {amount(tokens.completion.p90)} tokens, the longest "
        f"{amount(tokens.completion.max)}, and the whole batch is padded to it; {percent(tokens.padding_share)} of the "
        "log-prob passes is padding. Lengths are assumed to stay as they were seen",
        caveat="It changes learning: about a tenth of the completions would be cut off",
    )


def use_vllm(facts: Facts) -> Idea | None:
    """vLLM decodes in larger batches and fewer kernels than `generate`, by a factor that no formula tells: what is
    predicted is the work that it leaves out, less the old policy's pass that TRL then makes."""
    limit = facts.limits.get("generation")
    near = neighbour(facts, {"grpo.use_vllm": True}, legal=True)
    if near is None or facts.record.trainer.use_vllm or not facts.on_gpu:
        return None
    if limit is not None and limit.share > GOOD_LIMIT:
        return None
    runs = (
        "launches each kernel of each token"
        if limit is None
        else f"runs at {percent(limit.share)} of what this GPU can do"
    )
    return _idea(
        facts,
        near,
        because=f"`generate` {runs}. Counted is that finished "
        "completions leave vLLM's batch, that it computes a group's prompt once, and that TRL makes one more log-prob "
        "pass; how much faster it decodes is not predicted, and a search measures it",
        caveat="It changes learning a little: another engine samples, and TRL weighs samples by the difference; probe "
        "again and read the fidelity line",
        predicts=near.saving_s > 0.0,
    )


def truncated(facts: Facts) -> Idea | None:
    """A completion that was cut off was paid for and can seldom be right; no seconds are saved by letting it end."""
    tokens, t = facts.record.tokens, facts.record.trainer
    if tokens is None or tokens.truncated_share < MANY_TRUNCATED:
        return None
    lost = f" and masked: {_for_nothing(facts, tokens.truncated_share)}" if t.mask_truncated_completions else ""
    return Idea(
        kind="learning",
        stages=("generation",),
        changes=(Change(key=LENGTH, before=t.max_completion_length, after=2 * t.max_completion_length),),
        because=f"{percent(tokens.truncated_share)} of the completions were cut off before they ended{lost}. "
        f"Generation is predicted to take up to {seconds(facts.breakdown.seconds('generation'))} more of a step",
        caveat="It changes learning. A model that never ends its answers needs a prompt or a reward for short ones "
        "instead",
    )


def dead_groups(facts: Facts) -> Idea | None:
    """A group of equal rewards teaches nothing, whatever it cost. Where no rewards differed at all, no key helps. Else,
    with the completions of a step kept, groups of 2G in place of G are alive more often; silent if the useful
    completions of a step are not predicted to grow."""
    dead, tokens, t = facts.dead_share(), facts.record.tokens, facts.record.trainer
    if dead is None or tokens is None or dead < MANY_DEAD:
        return None
    seen = f"{tokens.dead_groups} of {tokens.groups} groups had equal rewards and taught nothing, "
    seen += _for_nothing(facts, dead)
    if facts.living is None:
        return Idea(
            kind="learning",
            stages=ROW_STAGES,
            action="check the rewards, or start from a model that sometimes succeeds",
            because=f"{seen}. At beta 0 such a step has no gradient at all",
        )
    size = t.num_generations
    now, then = facts.living.share(size), facts.living.share(2 * size)
    if t.generation_batch_size % (2 * size) or then * (2 * size - 1) / (2 * size) <= now * (size - 1) / size:
        return None
    return Idea(
        kind="learning",
        stages=ROW_STAGES,
        changes=(Change(key=GROUP, before=size, after=2 * size),),
        because=f"{seen}. Groups of {2 * size}, half as many in a batch, are predicted to "
        f"be without spread in {percent(1 - then)} of cases, if prompts succeed as often as seen here",
        caveat="It changes learning: fewer prompts per step. Leaving out prompts that always or never succeed helps as "
        "well",
    )


def no_gradient(facts: Facts) -> Idea | None:
    """Steps whose gradient was zero, where neither equal rewards nor masked completions explain all of them."""
    zero, steps = facts.record.zero_unexplained, len(facts.record.timings.step_s)
    if not zero:
        return None
    what, _, remedy = NO_SIGNAL["zero"].partition(": ")
    seen = f"In {zero} of {steps} steps {what}, {_for_nothing(facts, zero / steps)}"
    return Idea(kind="learning", stages=ROW_STAGES, action=remedy, because=seen)


def saves_nothing(facts: Facts) -> Idea | None:
    """A run that would end without a checkpoint."""
    if facts.grpo.get("save_strategy") != "best" or facts.grpo.get("eval_strategy", "no") != "no":
        return None
    return Idea(kind="exact", stages=("log_save_eval",), action="evaluate, or save by steps", because=SAVES_NOTHING)


def lora_dropout(facts: Facts) -> Idea | None:
    """Dropout in the adapters turns off what would compute a prompt once for all of its completions: the saving is
    that of the same configuration without it."""
    base, reasons = facts.base, facts.record.trainer.speedups_off
    off = [name for name, reason in reasons.items() if reason.startswith(LORA_DROPOUT)]
    if base is None or not off:
        return None
    near = neighbour(facts, {}, config=base.model_copy(update={"grpo": {**base.grpo, "disable_dropout": True}}))
    return Idea(
        kind="learning",
        stages=concerned(facts, near) if near else PASSES,
        changes=(Change(key="grpo.disable_dropout", before=False, after=True),),
        saving_s=near.saving_s if near else None,
        because=f"{LORA_DROPOUT} keeps {listing(off)} off" + (f". {moves(near)}" if near else ""),
        caveat="It changes learning: the adapters lose their dropout. peft.lora_dropout 0 is the same. "
        "{name: shared_prefix, dropout: shared} in speedups keeps it, with one mask for a group's prompt: not exact",
    )


ABOUT_ROWS = (image_size, oversized_images, fewer_generations, long_tail, truncated, dead_groups, no_gradient)
RULES = (*ABOUT_ROWS, use_vllm, lora_dropout, saves_nothing)


def _for_nothing(facts: Facts, share: float) -> str:
    """Seconds of a step that went into this share of its completions, in words; those that `skip_dead` leaves out of
    the passes took none there."""
    skips = "skip_dead" in facts.record.trainer.speedups
    lost_s = share * facts.breakdown.seconds(*(name for name in ROW_STAGES if not (skips and name in PASSES)))
    return f"{seconds(lost_s)} of a step ({percent(lost_s / facts.breakdown.step_s)}) for nothing"


def _idea(facts: Facts, near: Neighbour, *, because: str, predicts: bool = True, **more: Any) -> Idea:
    """A learning knob's idea; without a number where the models cannot tell."""
    return Idea(
        kind="learning",
        stages=concerned(facts, near) if predicts else ("generation",),
        changes=changes(facts, near),
        saving_s=near.saving_s if predicts else None,
        because=f"{because}. {moves(near)}" if predicts else because,
        **more,
    )
