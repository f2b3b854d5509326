"""Advice on the knobs of the table: the seconds are the models', and each knob has the sentences that explain them.

A knob that is searched by default is advised at the value that is predicted fastest. Knobs that change what is learned
are advised at values that a measurement speaks for (`learning`).
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from grpo_autotune.advice.bound import kernels_per
from grpo_autotune.advice.facts import PASSES, Facts, Idea
from grpo_autotune.advice.neighbours import Neighbour, changes, neighbours
from grpo_autotune.advice.remote import more_at_once
from grpo_autotune.knobs import engine, kind_of
from grpo_autotune.knobs.apply import MICRO, SLEEP
from grpo_autotune.knobs.table import Knob, grpo_value
from grpo_autotune.seams.loss import LOSS_KEYS, micro_batch_terms_of_keys
from grpo_autotune.units import listing, percent, seconds, size

MOVE_SHARE = 0.05
"""A stage is named if it changes by this part of the saving."""
MUCH_MEMORY = 0.01
"""Of the measured peak: more than this is worth a word."""

Sentence = Callable[[Facts, Neighbour], str]


class Words(NamedTuple):
    """The sentences of a knob: why it saves what it does, and what to watch."""

    because: Sentence
    caveat: Sentence = lambda facts, near: ""


def knob_ideas(facts: Facts) -> Iterator[Idea]:
    """An idea for every knob of `WORDS`, and every other one that a search turns without changing what is learned."""
    for row, nearby in neighbours(facts):
        fastest = max(nearby, key=lambda near: near.saving_s, default=None)
        advised = row.key in WORDS or (row.searched and row.kind == "exact")
        if fastest is not None and advised and concerned(facts, fastest):
            yield idea_of(facts, row, fastest)


def idea_of(facts: Facts, row: Knob, near: Neighbour) -> Idea:
    """The advice to change a knob so."""
    assert facts.base is not None
    words = WORDS.get(re.sub(r"\d+", "N", row.key), Words(lambda facts, near: row.why[0].upper() + row.why[1:]))
    by_call = row.key == "speedups" and facts.config is None
    caveats = (words.caveat(facts, near), more_memory(facts, near))
    return Idea(
        kind=kind_of(facts.base, row.key, facts.record),
        stages=concerned(facts, near),
        changes=() if by_call else changes(facts, near),
        action="call grpo_autotune.speed_up(trainer) before trainer.train()" if by_call else "",
        saving_s=near.saving_s,
        because=f"{words.because(facts, near)}. {moves(near)}",
        caveat=". ".join(text for text in caveats if text),
    )


def concerned(facts: Facts, near: Neighbour) -> tuple[str, ...]:
    """Stages that were measured and get shorter."""
    return tuple(stage for stage in near.stages if facts.breakdown.self_s.get(stage))


def moves(near: Neighbour) -> str:
    """The stages that change, each with its seconds per step before and after."""
    names = dict.fromkeys((*near.before, *near.after))
    pairs = {name: (near.before.get(name, 0.0), near.after.get(name, 0.0)) for name in names}
    least = MOVE_SHARE * abs(near.saving_s)
    told = [f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in pairs.items() if abs(old - new) > least]
    return f"Predicted by stage: {listing(told)}" if told else ""


def more_memory(facts: Facts, near: Neighbour) -> str:
    """The memory that a change takes, where it is much."""
    peak, memory = facts.peak_bytes(), facts.memory_bytes()
    if peak is None or memory is None or SLEEP in near.knobs or near.more_bytes <= MUCH_MEMORY * peak:
        return ""
    return f"It takes about {size(near.more_bytes)} more memory (predicted), and {size(memory - peak)} is free"


def _short(value: float) -> str:
    return seconds(value) if value > 0.0 else "0"


def _micro_batch(facts: Facts, near: Neighbour) -> str:
    t, after, profiled = facts.record.trainer, near.config.batch, facts.record.profiled
    busy = facts.busy_share(*PASSES)
    calls = t.gradient_accumulation_steps / after.accumulation
    times = f"{calls:g} times fewer" if calls >= 1.0 else f"{1 / calls:g} times more"
    return (
        f"The same {t.per_device_train_batch_size * t.gradient_accumulation_steps} completions go through the model in "
        f"{times} calls"
        + (f"; the device is {percent(busy)} busy in these passes" if busy is not None else "")
        + (f", which take {kernels_per(profiled, *PASSES)}" if profiled is not None and busy is not None else "")
        + ". It is assumed that a call costs a fixed time beside its work, and that the weights are read once per call"
    )


def _partition(facts: Facts, near: Neighbour) -> str:
    assert facts.base is not None
    loss = {name: grpo_value(name, facts.base) for name in LOSS_KEYS}
    terms = micro_batch_terms_of_keys(loss, facts.record.trainer.model_config_json)
    reason = listing([term.name for term in terms]) if terms else ""
    return f"This changes the loss, because {reason} depends on how the batch is split" if reason else ""


def _checkpointing(facts: Facts, near: Neighbour) -> str:
    if near.config.grpo.get("gradient_checkpointing"):
        return "Activations are computed a second time in the backward pass, which saves memory"
    return (
        "The backward pass computes the forward a second time to save memory; without that, the operations of one "
        "forward are left out of it"
    )


def _workers(facts: Facts, near: Neighbour) -> str:
    loading_s = facts.part_s("data", "load") or facts.breakdown.seconds("data")
    busy = None if facts.on_gpu else facts.busy_share(*PASSES, "generation")
    return (
        f"The step waits {seconds(loading_s)} for rows to be read and images to be decoded; workers do that beside "
        "the rest of the step" + ("" if busy is None else f", on cores that are {percent(busy)} busy")
    )


def _speedups(facts: Facts, near: Neighbour) -> str:
    """A micro batch with g completions of C tokens on a prompt of P has P + g C tokens instead of g (P + C)."""
    t, tokens, images = facts.record.trainer, facts.record.tokens, facts.record.images
    together, text = min(t.num_generations, t.per_device_train_batch_size), ""
    if tokens is not None and set(PASSES) & set(near.stages):
        prompt, completion = tokens.prompt.mean, tokens.completion.mean
        left = (prompt + together * completion) / (together * (prompt + completion))
        text = (
            f"{together} completions of a prompt share a micro batch; with {prompt:.0f} tokens of prompt and "
            f"{completion:.0f} of completion {percent(1.0 - left)} of what the log-prob and backward passes compute is "
            "a prompt that was computed before. It is assumed that what is left out costs a tenth of its time"
        )
    if images is not None and images.decodes_per_image > 1.0:
        times = f"Each image is decoded {images.decodes_per_image:.0f} times per step"
        text = f"{text}. {times}" if text else times
    return text or "Work that TRL does twice is done once"


def _sleep(facts: Facts, near: Neighbour) -> str:
    told, memory, peak = "vLLM is put to sleep and woken at every generation", facts.memory_bytes(), facts.peak_bytes()
    if engine.sleep_level(near.config) > 0 or memory is None or peak is None:
        return told
    share = engine.share_of(near.config) * memory
    return f"{told}; its {size(share)} and the trainer's peak of {size(peak)} fit into {size(memory)} side by side"


WORDS = {
    MICRO: Words(_micro_batch, _partition),
    "grpo.gradient_checkpointing": Words(_checkpointing),
    "grpo.dataloader_num_workers": Words(_workers),
    "speedups": Words(_speedups),
    SLEEP: Words(_sleep),
    "rewards.N.concurrency": Words(more_at_once),
    "grpo.beta": Words(
        lambda facts, near: "Without the KL term no reference log-probs are computed",
        lambda facts, near: (
            "It changes learning: nothing holds the policy near the model it started from; TRL's own default is 0"
        ),
    ),
}
