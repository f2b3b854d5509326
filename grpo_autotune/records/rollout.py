"""Facts about the rollout engine after a run: frozen, free of torch, and equal after a trip through JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class EngineRecord(BaseModel):
    """Base of these records: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FidelityPart(EngineRecord):
    """The differences of some of the sampled tokens.

    Attributes:
        rows: `image` where their prompts hold one, else `text`.
        when: `first` for tokens sampled before the first optimizer step that was watched, else `later`.
        seen: `repeated` where the same prompt (and image) was sampled from under older weights, else `new`.
    """

    rows: Literal["image", "text"]
    when: Literal["first", "later"]
    seen: Literal["new", "repeated"]
    mean_nats: float
    max_nats: float
    tokens: int


class Cause(EngineRecord):
    """One possible reason for log-probs that differ.

    Attributes:
        name: Such as `stale weights`.
        points: `yes` where what was measured speaks for it; `unknown` where it cannot tell.
        evidence: What was measured.
        check: What tells this cause from the others.
    """

    name: str
    points: Literal["yes", "no", "unknown"]
    evidence: str
    check: str


class Fidelity(EngineRecord):
    """Difference between the rollout engine's log-probs and the trainer's, in nats over sampled tokens.

    Both sides are compared as the model gives them. What truncated sampling and penalties do to the engine's numbers is
    computed from the trainer's logits and told apart as `shift_nats`.

    Attributes:
        mean_nats: Mean absolute difference.
        max_nats: Largest.
        tokens: Tokens compared.
        threshold_nats: The mean above which it is not rounding: the coarser of the two dtypes decides.
        ok: The mean is within the threshold, the engine samples with the trainer's parameters, and its weights follow.
        dropped_share: Share of `dropped_of` whose importance weight is zero; None without the correction.
        dropped_of: What is dropped as a whole: `samples` in TRL's `sequence_*` modes, `tokens` in its `token_*` modes.
        shift_nats: Mean absolute difference that the sampling parameters make; None where they make none.
        sampling: The parameters that the engine sampled with, where they are not plain sampling.
        text_nats: Mean absolute difference over a fixed text that both sides score; None where that was not possible.
        moved: True if the engine's log-probs of that text moved whenever the trainer's did; None where the trainer's
            moved too little to tell.
        updates_checked: Optimizer steps (or groups of them) behind `moved`.
        trainer_moved_nats: Mean over them of how far the trainer's log-probs of the text moved.
        engine_moved_nats: The same of the engine's.
        parts: The differences by kind of row.
        cause: What the evidence points to, where it is not ok; None where it does not decide.
        causes: Every cause considered.
    """

    mean_nats: float
    max_nats: float
    tokens: int
    threshold_nats: float
    ok: bool
    dropped_share: float | None = None
    dropped_of: Literal["samples", "tokens"] | None = None
    shift_nats: float | None = None
    sampling: dict[str, float] = {}
    text_nats: float | None = None
    moved: bool | None = None
    updates_checked: int = 0
    trainer_moved_nats: float | None = None
    engine_moved_nats: float | None = None
    parts: list[FidelityPart] = []
    cause: str | None = None
    causes: list[Cause] = []


class EngineFacts(EngineRecord):
    """Work of the engine in the measured generations. Rates are of this rank's engine.

    Attributes:
        generations: Calls that asked it for completions.
        prompt_tokens: Tokens of the prompts of all its requests.
        cached_tokens: Those of them whose keys and values came from the prefix cache.
        prefill_tokens: Prompt tokens that were computed.
        decode_tokens: Tokens computed one after another.
        prefill_s: Seconds of engine steps that computed prompt tokens (among others).
        decode_s: Seconds of engine steps that only decoded.
        prefill_tokens_per_s: Prompt tokens computed over `prefill_s`.
        decode_tokens_per_s: Decoded tokens of the steps that only decoded, over `decode_s`.
        images_encoded: Runs of the vision encoder; None where the engine does not tell.
        running_mean: Requests under way, over the engine's steps, each weighted with its seconds.
        running_max: Most of them.
        waiting_max: Most requests that waited for a place.
        kv_use_max: Largest share of the key-value cache in use; None where the engine does not tell.
        kv_tokens: Tokens that the key-value cache holds.
        preemptions: Requests thrown out for lack of cache, to be computed anew.
        start_s: Seconds that starting the engine took; None where it was started elsewhere.
        sleep_s: Seconds per call of `sleep`; None without calls. `wake_s`, `sync_s`: the same of `wake_up` and of a
            weight sync.
        syncs: Weight syncs.
        sync_bytes: Bytes that one of them moved.
        sync_way: `merged`, `batched` or `adapter`.
        source: Where these numbers come from: the engine's scheduler in this process, or a server's metrics.
    """

    generations: int
    prompt_tokens: int
    cached_tokens: int
    prefill_tokens: int
    decode_tokens: int
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    images_encoded: int | None = None
    running_mean: float | None = None
    running_max: int | None = None
    waiting_max: int | None = None
    kv_use_max: float | None = None
    kv_tokens: int | None = None
    preemptions: int = 0
    start_s: float | None = None
    sleep_s: float | None = None
    wake_s: float | None = None
    sync_s: float | None = None
    syncs: int = 0
    sync_bytes: int | None = None
    sync_way: str | None = None
    source: Literal["scheduler", "server"] = "scheduler"
