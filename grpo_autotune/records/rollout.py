"""Facts about the rollout engine after a run: frozen, free of torch, and equal after a trip through JSON."""

from typing import Literal

from grpo_autotune.records.base import Frozen


class FidelityPart(Frozen):
    """The differences of some of the sampled tokens."""

    rows: Literal["image", "text"]  # `image` where their prompts hold one, else `text`
    # `first` for tokens sampled before the first optimizer step that was watched, else `later`
    when: Literal["first", "later"]
    # `repeated` where the same prompt (and image) was sampled from under older weights, else `new`
    seen: Literal["new", "repeated"]
    mean_nats: float
    max_nats: float
    tokens: int


class Cause(Frozen):
    """One possible reason for log-probs that differ."""

    name: str  # such as `stale weights`
    # `yes` where what was measured speaks for it; `unknown` where it cannot tell
    points: Literal["yes", "no", "unknown"]
    evidence: str  # what was measured
    check: str  # what tells this cause from the others


class Fidelity(Frozen):
    """Difference between the rollout engine's log-probs and the trainer's, in nats over sampled tokens, both as the
    model gives them: what sampling parameters do to the engine's is told apart as `shift_nats`."""

    mean_nats: float  # mean absolute difference
    max_nats: float  # largest
    tokens: int  # tokens compared
    threshold_nats: float  # the mean above which it is not rounding: the coarser of the two dtypes decides
    # the mean is within the threshold, the engine samples with the trainer's parameters, and its weights follow
    ok: bool
    # share of `dropped_of` whose importance weight is zero; None without the correction
    dropped_share: float | None = None
    # what is dropped as a whole: `samples` in TRL's `sequence_*` modes, `tokens` in its `token_*` modes
    dropped_of: Literal["samples", "tokens"] | None = None
    # mean absolute difference that the sampling parameters make; None where they make none
    shift_nats: float | None = None
    sampling: dict[str, float] = {}  # the parameters that the engine sampled with, where they are not plain sampling
    # mean absolute difference over a fixed text that both sides score; None where that was not possible
    text_nats: float | None = None
    # True if the engine's log-probs of that text moved whenever the trainer's did; None where the trainer's moved too
    # little to tell
    moved: bool | None = None
    updates_checked: int = 0  # optimizer steps (or groups of them) behind `moved`
    trainer_moved_nats: float | None = None  # mean over them of how far the trainer's log-probs of the text moved
    engine_moved_nats: float | None = None  # the same of the engine's
    parts: list[FidelityPart] = []  # the differences by kind of row
    cause: str | None = None  # what the evidence points to, where it is not ok; None where it does not decide
    causes: list[Cause] = []  # every cause considered


class EngineFacts(Frozen):
    """Work of the engine in the measured generations. Rates are of this rank's engine."""

    generations: int  # calls that asked it for completions
    prompt_tokens: int  # tokens of the prompts of all its requests
    cached_tokens: int  # those of them whose keys and values came from the prefix cache
    prefill_tokens: int  # prompt tokens that were computed
    decode_tokens: int  # tokens computed one after another
    prefill_s: float  # seconds of engine steps that computed prompt tokens (among others)
    decode_s: float  # seconds of engine steps that only decoded
    prefill_tokens_per_s: float | None  # prompt tokens computed over `prefill_s`
    decode_tokens_per_s: float | None  # decoded tokens of the steps that only decoded, over `decode_s`
    images_encoded: int | None = None  # runs of the vision encoder; None where the engine does not tell
    running_mean: float | None = None  # requests under way, over the engine's steps, each weighted with its seconds
    running_max: int | None = None  # most of them
    waiting_max: int | None = None  # most requests that waited for a place
    kv_use_max: float | None = None  # largest share of the key-value cache in use; None where the engine does not tell
    kv_tokens: int | None = None  # tokens that the key-value cache holds
    preemptions: int = 0  # requests thrown out for lack of cache, to be computed anew
    start_s: float | None = None  # seconds that starting the engine took; None where it was started elsewhere
    # seconds per call of `sleep`; None without calls. `wake_s`, `sync_s`: the same of `wake_up` and of a weight sync
    sleep_s: float | None = None
    wake_s: float | None = None
    sync_s: float | None = None
    syncs: int = 0  # weight syncs
    sync_bytes: int | None = None  # bytes that one of them moved
    sync_way: str | None = None  # `merged`, `batched` or `adapter`
    # where these numbers come from: the engine's scheduler in this process, or a server's metrics
    source: Literal["scheduler", "server"] = "scheduler"
