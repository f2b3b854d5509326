"""The record of calls that a reward over a network made. Times are seconds."""

from typing import Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen


class CallTimes(Frozen):
    """Seconds of one kind of waiting, over calls."""

    p50: float
    p95: float
    p99: float


class RemoteCalls(Frozen):
    """Calls of one reward over a network while steps were measured, on this rank."""

    name: str
    kind: str  # `judge`, `service`, or `async` for a user's own function
    batches: int  # times that TRL asked for scores
    rows: int  # completions to score
    calls: int  # requests sent, retries included
    retries: int
    rate_limited: int  # answers of status 429
    fallbacks: int  # rows that another provider than the first scored
    cache_hits: int
    failures: dict[str, int]  # kind of failure -> rows that got no score in the end
    providers: dict[str, int]  # provider -> rows that it scored
    first_call_s: float | None  # the first call of the process, connection and warm-up included
    wait_s: CallTimes | None  # from the batch's begin until a call is sent; None without a call
    call_s: CallTimes | None  # one request
    retry_s: CallTimes | None  # of the rows that needed more than one request: from the first's end to the last's begin
    batch_s: float  # all seconds in which at least one batch was under way
    concurrency: int | None  # calls at once at the end, None where nothing limits them
    tokens_in: int
    tokens_out: int
    cost: float | None  # in the currency of `price_in` and `price_out`; None where no price is given
    place: int = 0  # of the reward in `rewards`
    # in a report, over all ranks by this rank's means per row, evaluations left out; None where it is not known
    calls_per_step: float | None = None
    tokens_per_step: float | None = None  # sent and received
    cost_per_step: float | None = None
    cost_per_run: float | None = None  # of the steps that are configured
    step_s: float | None = None  # of `probe --rewards-only`: predicted seconds per step if nothing runs beside them


class Sweep(Document):
    """The JSON of `probe --rewards-only`: calls of each reward with 1, 2, 4, ... of them at once."""

    schema_: Literal["grpo-autotune/rewards/1"] = Field(default="grpo-autotune/rewards/1", alias="schema")
    source: str  # of the texts that were scored
    settings: list[RemoteCalls]
