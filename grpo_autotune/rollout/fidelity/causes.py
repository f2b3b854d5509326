"""Causes of a difference between engine and trainer: what each would show, held against what was measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from grpo_autotune.records.rollout import Cause, FidelityPart

Points = Literal["yes", "no", "unknown"]

CHECKS = {
    "placeholders": "compare the prompt's token ids in engine and trainer, after each has put in the image tokens",
    "sampling parameters": "apply the engine's parameters to the trainer's logits: then the log-probs agree",
    "stale weights": "score one text before and after an optimizer step: the engine's log-probs must move as the "
    "trainer's do",
    "stale caches": "compare prompts and images that the engine has met under older weights with new ones: only the "
    "former are off",
    "processor": "with the same token ids and a text that is right, images that are off from the first generation on "
    "have other pixels",
    "dropout": "compute the trainer's log-probs without dropout: then they agree",
    "dtype": "score one text before the first optimizer step: it is off already, and the number formats differ",
}
"""What tells each cause from the others."""


@dataclass(frozen=True)
class Evidence:
    """Measurements that speak for a cause or against it."""

    threshold_nats: float  # means above it are not rounding
    # differences of sampled tokens by kind of row, the engine's sampling parameters allowed for
    parts: tuple[FidelityPart, ...] = ()
    # mean difference over the fixed text before the first optimizer step; `text_later` after it
    text_first: float | None = None
    text_later: float | None = None
    moved: bool | None = None  # as `Fidelity.moved`, with the means of how far either side moved
    trainer_moved_nats: float | None = None
    engine_moved_nats: float | None = None
    prompts: int = 0  # prompts whose ids could be compared, `prompts_differ` of them with other ids in the engine
    prompts_differ: int = 0
    lengths: tuple[int, int] | None = None  # tokens of one that differs: (the engine's, the trainer's)
    # image tokens of it, and images: (the engine's, the trainer's, images); None where not known
    image_tokens: tuple[int, int, int] | None = None
    dropout: str = ""  # name of a module whose dropout is active while the trainer computes log-probs; empty without
    # parameters that differ: (the engine's, the trainer's)
    sampling: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shift_nats: float = 0.0  # what they and truncation do to the log-probs
    # the trainer's number format and the engine's, with its cache's and its quantization where it has one
    formats: tuple[str, str] = ("", "")

    def mean(self, **kind: str) -> float | None:
        """Mean difference over the parts of a kind, such as `rows="image"`; None where there are none."""
        chosen = [p for p in self.parts if all(getattr(p, name) == value for name, value in kind.items())]
        tokens = sum(p.tokens for p in chosen)
        return math.fsum(p.mean_nats * p.tokens for p in chosen) / tokens if tokens else None

    def off(self, **kind: str) -> bool | None:
        """True if a kind of rows is off; None where there are none."""
        return self.over(self.mean(**kind))

    def over(self, nats: float | None) -> bool | None:
        """True if a mean is above the threshold; None where it is not known."""
        return None if nats is None else nats > self.threshold_nats

    def other_size(self) -> str:
        """The other number of tokens that the engine's processor makes of an image; empty where that is not the matter:
        placeholders that are expanded twice make 2 n - 1 tokens of n."""
        engine, trainer, images = self.image_tokens or (0, 0, 0)
        told = f"{engine} image tokens in the engine where it has {trainer} here"
        return "" if engine in (trainer, 2 * trainer - images) else told

    def text_off(self) -> bool | None:
        """True if the fixed text is off at any time; None where that is not known."""
        known = [nats for nats in (self.text_first, self.text_later) if nats is not None]
        return self.over(max(known)) if known else None


def diagnose(evidence: Evidence) -> tuple[str | None, list[Cause]]:
    """The first cause that the evidence speaks for, and every cause with its evidence."""
    judged = {
        "placeholders": _placeholders(evidence),
        "sampling parameters": _sampling(evidence),
        "stale weights": _stale_weights(evidence),
        "stale caches": _stale_caches(evidence),
        "processor": _processor(evidence),
        "dropout": _dropout(evidence),
        "dtype": _dtype(evidence),
    }
    causes = [Cause(name=n, points=points, evidence=told, check=CHECKS[n]) for n, (points, told) in judged.items()]
    return next((cause.name for cause in causes if cause.points == "yes"), None), causes


def nats(value: float | None) -> str:
    """Two digits, or a word where it is not known."""
    return "an unknown number of nats" if value is None else f"{value:.2g} nats"


def _placeholders(e: Evidence) -> tuple[Points, str]:
    if not e.prompts:
        return "unknown", "the engine's prompts were not seen"
    if not e.prompts_differ:
        return "no", f"all {e.prompts} prompts have the same token ids in engine and trainer"
    if e.other_size():
        return "no", f"each image has one place in the prompt, but another size: {e.other_size()}"
    lengths = "" if e.lengths is None else f", one of them {e.lengths[0]} tokens there and {e.lengths[1]} here"
    return "yes", f"{e.prompts_differ} of {e.prompts} prompts have other token ids in the engine{lengths}"


def _sampling(e: Evidence) -> tuple[Points, str]:
    if not e.sampling:
        return "no", "the engine sampled with the trainer's parameters"
    told = " and ".join(
        f"{name} {engine:g} where the trainer has {trainer:g}" for name, (engine, trainer) in e.sampling.items()
    )
    if e.off():
        return "unknown", f"the engine sampled with {told}, but that alone does not explain the difference"
    return "yes", (
        f"the engine sampled with {told}: that shifts the log-probs by {nats(e.shift_nats)}; "
        f"allowed for, they agree to {nats(e.mean())}"
    )


def _stale_weights(e: Evidence) -> tuple[Points, str]:
    moved = f"the trainer's log-probs of a fixed text moved by {nats(e.trainer_moved_nats)} over an optimizer step"
    if e.moved is False:
        return "yes", f"{moved}, the engine's by {nats(e.engine_moved_nats)}"
    if e.over(e.text_later) and not e.over(e.text_first):
        before = "" if e.text_first is None else f" (before it {nats(e.text_first)})"
        return "yes", f"after an optimizer step a fixed text is {nats(e.text_later)} off{before}"
    image = {"rows": "image", "when": "later"}
    if e.off(rows="image", when="first") is False and e.off(**image) and e.text_off() is False:
        told = "images were right before the first optimizer step and are off after it, while a fixed text is right"
        new = e.off(**image, seen="new")
        if new is None:
            return "unknown", f"{told}: the weights of the vision tower, or caches"
        return ("yes", f"{told}, new images too: the vision tower") if new else ("no", f"{told}, new images not")
    if e.moved:
        return "no", f"{moved}, the engine's by {nats(e.engine_moved_nats)}"
    return "unknown", "no optimizer step moved the trainer's log-probs far enough to tell"


def _stale_caches(e: Evidence) -> tuple[Points, str]:
    for rows in ("image", "text"):
        new, repeated = (e.mean(rows=rows, when="later", seen=seen) for seen in ("new", "repeated"))
        if e.over(repeated) and e.over(new) is False:
            return "yes", f"{rows} rows met under older weights are {nats(repeated)} off, new ones {nats(new)}"
    repeated = e.mean(when="later", seen="repeated")
    if repeated is None:
        return "unknown", "no prompt was sampled from twice with an optimizer step between"
    if e.over(repeated):
        new = e.mean(when="later", seen="new")
        if new is None:
            return "unknown", "after the first optimizer step every prompt was one met before"
        return "no", f"new rows are off too, by {nats(new)}"
    return "no", f"rows met under older weights are right ({nats(repeated)})"


def _processor(e: Evidence) -> tuple[Points, str]:
    image = e.mean(rows="image")
    if image is None:
        return "no", "no prompt holds an image"
    if not e.over(image):
        return "no", f"image rows are right ({nats(image)})"
    if e.other_size():
        return "yes", f"a prompt has {e.other_size()}"
    text_wrong = e.off(rows="text") if e.text_off() is None else e.text_off()
    if text_wrong:
        return "no", "text is off too"
    if e.off(rows="image", when="first") is False:
        return "no", "image rows were right before the first optimizer step"
    if not e.prompts or e.prompts_differ or text_wrong is None or e.dropout:
        return "unknown", f"image rows are {nats(image)} off"
    return "yes", f"the token ids are the same and text is right, and image rows are {nats(image)} off from the start"


def _dropout(e: Evidence) -> tuple[Points, str]:
    if not e.dropout:
        return "no", "no dropout is active while the trainer computes log-probs"
    told = f"the dropout of {e.dropout} is active while the trainer computes log-probs"
    if e.off(when="first") and e.text_off() is False and not e.prompts_differ and e.off(rows="text") is not False:
        return "yes", f"{told}; without it a fixed text is right"
    return "unknown", told


def _dtype(e: Evidence) -> tuple[Points, str]:
    trainer, engine = e.formats
    if trainer == engine:
        return "no", f"both compute in {trainer or 'the same number format'}"
    told = f"the trainer computes in {trainer}, the engine in {engine or 'a format that it does not tell'}"
    if e.text_off() is False:
        return "no", f"{told}, and a fixed text agrees to {nats(max(e.text_first or 0.0, e.text_later or 0.0))}"
    if e.over(e.text_first):
        return "yes", f"{told}, and a fixed text is {nats(e.text_first)} off before the first optimizer step"
    return "unknown", told
