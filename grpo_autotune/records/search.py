"""The types of `search.json`. Times are seconds, sizes bytes; `docs/search.md` explains every key."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field

from grpo_autotune.records.base import Frozen
from grpo_autotune.records.probe import OtherLoad
from grpo_autotune.records.report import Change, Kind
from grpo_autotune.records.trial import Progress, Status, TrialSpec

SCHEMA: Final = "grpo-autotune/search/1"

Ended = Literal["budget", "exhausted", "interrupted", "prediction", "failing"]
"""Reason for the end of a search: time was up; nothing left could win; Ctrl-C; it only predicted (`--budget 0`); or
trials failed one after another whatever the knobs."""


class Guard(Change):
    """Judgement of one value of one learning knob: does it learn the same?

    Attributes:
        proven: True where it may enter `tuned.yaml` on the measurements alone.
        why: The reason in one sentence.
        reward_difference: Mean reward with the change less that without, on the same prompts; None where not measured.
        reward_low: Lower end of its interval.
        reward_high: Upper end.
        prompts: Pairs it rests on.
        prompts_needed: Pairs that would settle it if difference and spread stay as measured; None where it is settled,
            or where nothing was measured.
        truncated_before: Share of completions cut off without the change.
        truncated_after: Share with it.
    """

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
    """One configuration with all that was measured or predicted of it.

    Attributes:
        knobs: Key path -> value, of every knob of the space.
        changed: Those that differ from the user's.
        number: Trial that measured it; None where it is predicted.
        score: Useful completions per second.
        baseline_step_s: Median seconds of a step of the user's configuration that `speedup` was taken against: of the
            same race where `raced`.
        step_s: Median seconds of an optimizer step.
        step_s_ci: Its interval.
        steps: Steps it rests on.
        predicted_s: Prediction of `step_s` before it was measured.
        speedup: `score` over the baseline's.
        ci: Its interval; of the race where `raced`.
        raced: True where both were measured in an interleaved race on the same prompts.
        peak_bytes: Most memory.
        worst_case: Outcome of the step with the longest prompts, largest images and full-length completions.
    """

    knobs: dict[str, Any]
    changed: dict[str, Any]
    number: int | None = None
    score: float
    step_s: float
    baseline_step_s: float
    step_s_ci: list[float]
    steps: int
    predicted_s: float | None = None
    speedup: float
    ci: list[float]
    raced: bool = False
    peak_bytes: int | None = None
    worst_case: Literal["passed", "not run"] = "not run"


class TrialRow(Frozen):
    """One trial of the table; `score` is None unless it was measured, `source` names what proposed it."""

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
    """Relative errors of the predictions that were made before trials measured the same."""

    median: float
    p90: float
    n: int


class Skipped(Frozen):
    """Combinations that were not run, and why."""

    why: str
    count: int
    example: dict[str, Any]


class Contribution(Change):
    """Part of one change in the winner's speed: that speed over the speed with this change alone taken back.

    Attributes:
        factor: None where the winner without this change is no legal combination; `why` says so.
        low: Lower end of its interval; None where it has none.
        high: Upper end.
        measured: False where it is predicted.
    """

    kind: Kind
    factor: float | None = None
    low: float | None = None
    high: float | None = None
    measured: bool = False
    why: str | None = None


class ParetoRow(Frozen):
    """A combination that no other beats in speed, reward and memory at once; a reward of None was not measured."""

    number: int
    changed: dict[str, Any]
    speedup: float
    reward_difference: float | None
    peak_bytes: int | None


class SearchProgress(NamedTuple):
    """State of a running search, for the live view.

    Attributes:
        left_s: Seconds left of the budget.
        total_s: The whole budget.
        trial: The trial under way.
        progress: Its stage and step; None before it tells any.
        changed: Its knobs that differ from the user's.
        done: Trials that are over.
        baseline: The user's values of the knobs.
        baseline_step_s: Seconds per step of the user's configuration; None until they are measured.
        best_step_s: Seconds per step of the best so far.
        best_changed: Its knobs that differ from the user's.
        speedup: Its score over that of the user's configuration.
        skipped: Combinations that are not run.
        step_error: Median relative error of the predicted seconds per step; None until a prediction was checked.
    """

    left_s: float
    total_s: float
    trial: TrialSpec
    done: int
    skipped: list[Skipped]
    progress: Progress | None = None
    changed: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    baseline_step_s: float | None = None
    best_step_s: float | None = None
    best_changed: dict[str, Any] = {}
    speedup: float = 1.0
    step_error: float | None = None


class SearchReport(Frozen):
    """Everything one search has to say.

    Attributes:
        baseline: The user's configuration.
        best: Of `tuned.yaml`: the baseline itself where nothing beats it beyond noise.
        best_exact: Of `tuned.exact.yaml`.
        best_fast: Of `tuned.fast.yaml`.
        together: The winner's speed-up over the product of its contributions.
        exact_share: Part of the winner's gain (of its logarithm) that its exact knobs bring; None without a gain.
        space: Knob -> its values.
        points: Legal combinations.
        memory_limit_bytes: What a trial may take.
        evaluation_s: Seconds per step that evaluations take as the user has them, counted in every speed-up.
        saving_s: The same of checkpoints.
        others: Load by other processes, in the middle one of the trials; None where nobody tells.
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
    together: float = 1.0
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
    evaluation_s: float = 0.0
    saving_s: float = 0.0
    others: OtherLoad | None = None
    budget_s: float
    elapsed_s: float
    files: dict[str, str]
    machine: dict[str, Any]
    config: dict[str, Any]

    @property
    def predicted(self) -> bool:
        """True where nothing but the probe was measured."""
        return self.ended == "prediction"
