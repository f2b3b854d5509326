"""The types of `search.json`. Times are seconds, sizes bytes; `docs/search.md` explains every key."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from grpo_autotune.records.base import Frozen
from grpo_autotune.records.trial import Status

SCHEMA: Final = "grpo-autotune/search/1"

Ended = Literal["budget", "exhausted", "interrupted", "prediction", "failing"]
"""Why a search came to its end: time was up; nothing left could win; Ctrl-C; it only predicted (`--budget 0`); or
trials failed one after another whatever the knobs."""


class Guard(Frozen):
    """What was found out about one value of one learning knob.

    Attributes:
        key: The knob.
        before: The user's value.
        after: The value judged.
        proven: Whether it may enter `tuned.yaml` on the measurements alone.
        why: In one sentence.
        reward_difference: Mean reward with the change less that without, on the same prompts; null where not measured.
        reward_low: Lower end of its interval.
        reward_high: Upper end.
        prompts: Pairs it rests on.
        prompts_needed: Pairs that would settle it if difference and spread stay as seen; null where it is settled, or
            where nothing was seen.
        truncated_before: Share of completions cut off without the change.
        truncated_after: Share with it.
    """

    key: str
    before: Any
    after: Any
    proven: bool
    why: str
    reward_difference: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None
    prompts: int = 0
    prompts_needed: int | None = None
    truncated_before: float | None = None
    truncated_after: float | None = None


class Candidate(Frozen):
    """One configuration with everything that was found out about it.

    Attributes:
        knobs: Key path -> value, of every knob of the space.
        changed: Those that differ from the user's.
        number: Trial that measured it; null where it is predicted.
        score: Useful completions a second.
        baseline_step_s: Median seconds of a step of the user's configuration that `speedup` was taken against: of the
            same race where `raced`.
        step_s: Median seconds of an optimizer step.
        step_s_ci: Its interval.
        steps: Steps it rests on.
        predicted_s: What the models said of `step_s` before it was measured.
        speedup: `score` over the baseline's.
        ci: Its interval; of the race where `raced`.
        raced: Whether both were measured in turns on the same prompts.
        peak_bytes: Most memory.
        worst_case: The step with longest prompts, largest images, full-length completions.
    """

    knobs: dict[str, Any]
    changed: dict[str, Any]
    number: int | None
    score: float
    step_s: float
    baseline_step_s: float
    step_s_ci: list[float]
    steps: int
    predicted_s: float | None
    speedup: float
    ci: list[float]
    raced: bool
    peak_bytes: int | None
    worst_case: Literal["passed", "not run"] = "not run"


class TrialRow(Frozen):
    """One trial of the table; `score` is null unless it was measured, `source` is who proposed it."""

    number: int
    purpose: str
    knobs: dict[str, Any]
    status: Status
    step_s: float | None
    predicted_s: float | None
    peak_bytes: int | None
    why: str | None
    score: float | None
    elapsed_s: float
    warm: bool
    source: str


class ModelError(Frozen):
    """How far predictions made before a trial were from what it measured, as shares."""

    median: float
    p90: float
    n: int


class Skipped(Frozen):
    """Combinations that were not run, and why."""

    why: str
    count: int
    example: dict[str, Any]


class Contribution(Frozen):
    """What one change of the winner brings: its speed over the speed with this change alone taken back.

    Attributes:
        factor: Null where the winner without this change is no legal combination; `why` says so.
        measured: False where the models say it.
    """

    key: str
    before: Any
    after: Any
    kind: Literal["exact", "learning"]
    factor: float | None
    low: float | None
    high: float | None
    measured: bool
    why: str | None = None


class ParetoRow(Frozen):
    """A combination that no other beats in speed, reward and memory at once; a reward of null was not measured."""

    number: int
    changed: dict[str, Any]
    speedup: float
    reward_difference: float | None
    peak_bytes: int | None


class SearchReport(Frozen):
    """Everything one search has to say.

    Attributes:
        baseline: The user's configuration.
        best: Of `tuned.yaml`: the baseline itself where nothing beats it beyond noise.
        best_exact: Of `tuned.exact.yaml`.
        best_fast: Of `tuned.fast.yaml`.
        exact_share: Part of the winner's gain (of its logarithm) that its exact knobs bring; null without a gain.
        space: Knob -> its values.
        points: Legal combinations.
        memory_limit_bytes: What a trial may take.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, protected_namespaces=()
    )

    schema_: Literal["grpo-autotune/search/1"] = Field(default=SCHEMA, alias="schema")
    ended: Ended
    why_ended: str
    baseline: Candidate
    best: Candidate
    best_exact: Candidate
    best_fast: Candidate
    exact_share: float | None
    contributions: list[Contribution]
    guards: list[Guard]
    pareto: list[ParetoRow]
    trials: list[TrialRow]
    skipped: list[Skipped]
    model_error: dict[str, ModelError]
    notes: list[str]
    space: dict[str, list[Any]]
    points: int
    sampler: str
    confidence: float
    memory_limit_bytes: int | None
    budget_s: float
    elapsed_s: float
    files: dict[str, str]
    machine: dict[str, Any]
    config: dict[str, Any]

    @property
    def predicted(self) -> bool:
        """Whether nothing of it but the probe was measured."""
        return self.ended == "prediction"
