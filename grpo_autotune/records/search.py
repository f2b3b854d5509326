"""The types of `search.json`. Times are seconds, sizes bytes; `docs/search.md` explains every key."""

from typing import Any, Literal, NamedTuple

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen
from grpo_autotune.records.probe import OtherLoad
from grpo_autotune.records.report import Change, Kind
from grpo_autotune.records.trial import Progress, Status, TrialSpec

Ended = Literal["budget", "exhausted", "interrupted", "prediction", "failing"]
"""Reason for the end of a search: time was up; nothing left could win; Ctrl-C; it only predicted (`--budget 0`); or
trials failed one after another whatever the knobs."""


class Guard(Change):
    """Judgement of one value of one learning knob: does it learn the same?"""

    proven: bool  # True where it may enter `tuned.yaml` on the measurements alone
    why: str  # the reason in one sentence
    # mean reward with the change less that without, on the same prompts; None where not measured
    reward_difference: float | None = None
    reward_low: float | None = None  # lower end of its interval
    reward_high: float | None = None  # upper end
    prompts: int = 0  # pairs it rests on
    # pairs that would settle it if difference and spread stay as measured; None where it is settled, or where nothing
    # was measured
    prompts_needed: int | None = None
    truncated_before: float | None = None  # share of completions cut off without the change
    truncated_after: float | None = None  # share with it


class Candidate(Frozen):
    """One configuration with all that was measured or predicted of it."""

    knobs: dict[str, Any]  # key path -> value, of every knob of the space
    changed: dict[str, Any]  # those that differ from the user's
    number: int | None = None  # trial that measured it; None where it is predicted
    score: float  # useful completions per second
    step_s: float  # median seconds of an optimizer step
    # median seconds of a step of the user's configuration that `speedup` was taken against: of the same race where
    # `raced`
    baseline_step_s: float
    step_s_ci: list[float]  # interval of `step_s`
    steps: int  # steps it rests on
    predicted_s: float | None = None  # prediction of `step_s` before it was measured
    speedup: float  # `score` over the baseline's
    ci: list[float]  # its interval; of the race where `raced`
    raced: bool = False  # True where both were measured in an interleaved race on the same prompts
    # share of completions that a step of `step_s` trains on while `skip_dead` leaves out the others, and seconds by
    # which one is longer that trains on all than one that trains on none; None without it, or where nothing told them
    living_share: float | None = None
    living_s: float | None = None
    peak_bytes: int | None = None  # most memory
    # outcome of the step with the longest prompts, largest images and full-length completions
    worst_case: Literal["passed", "not run"] = "not run"


class TrialRow(Frozen):
    """One trial of the table; `score` is None unless it was measured, `source` names what proposed it. Of one that ran
    beside others, on the part of the machine that `place` names, `step_s` is without what that and they cost: over the
    ratio of the user's own configuration there to the same alone."""

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
    place: str | None = None


class ModelError(Frozen):
    """Relative errors of the predictions that were made before trials measured the same."""

    median: float
    p90: float
    n: int


Figures = tuple[float, float, float, int]


class RaceRow(Frozen):
    """A race as far as it went, a line of `races.jsonl`: medians with their interval's ends and the rounds they rest
    on, or the reason why the rival may not win."""

    before: dict[str, Any]  # knobs of the one that the rival is compared with
    rival: dict[str, Any]
    speedup: Figures = (1.0, 0.0, 0.0, 0)  # score of the rival over the other's
    step: Figures = (0.0, 0.0, 0.0, 0)  # the rival's seconds per step
    before_step: Figures = (0.0, 0.0, 0.0, 0)  # the other's
    fails: str | None = None


class Skipped(Frozen):
    """Combinations that were not run, and why."""

    why: str
    count: int
    example: dict[str, Any]


class Contribution(Change):
    """Part of one change in the winner's speed: that speed over the speed with this change alone taken back."""

    kind: Kind
    factor: float | None = None  # None where the winner without this change is no legal combination; `why` says so
    low: float | None = None  # lower end of its interval; None where it has none
    high: float | None = None  # upper end
    measured: bool = False  # False where it is predicted
    why: str | None = None


class ParetoRow(Frozen):
    """A combination that no other beats in speed, reward and memory at once; a reward of None was not measured."""

    number: int
    changed: dict[str, Any]
    speedup: float
    reward_difference: float | None
    peak_bytes: int | None


class SearchProgress(NamedTuple):
    """State of a running search, for the live view."""

    left_s: float  # seconds left of the budget
    total_s: float  # the whole budget
    trial: TrialSpec  # the trial under way
    done: int  # trials that are over
    skipped: list[Skipped]  # combinations that are not run
    progress: Progress | None = None  # the trial's stage and step; None before it tells any
    changed: dict[str, Any] = {}  # the trial's knobs that differ from the user's
    baseline: dict[str, Any] = {}  # the user's values of the knobs
    baseline_step_s: float | None = None  # seconds per step of the user's configuration; None until they are measured
    best_step_s: float | None = None  # seconds per step of the best so far
    best_changed: dict[str, Any] = {}  # the best's knobs that differ from the user's
    speedup: float = 1.0  # the best's score over that of the user's configuration
    # median relative error of the predicted seconds per step; None until a prediction was checked
    step_error: float | None = None
    said: list[str] = []  # what befell workers so far, a sentence each


class SearchReport(Document):
    """Everything one search has to say."""

    schema_: Literal["grpo-autotune/search/1"] = Field(default="grpo-autotune/search/1", alias="schema")
    ended: Ended
    why_ended: str
    baseline: Candidate  # the user's configuration
    best: Candidate  # of `tuned.yaml`: the baseline itself where nothing beats it beyond noise
    best_exact: Candidate  # of `tuned.exact.yaml`
    best_fast: Candidate  # of `tuned.fast.yaml`
    # part of the winner's gain (of its logarithm) that its exact knobs bring; None without a gain
    exact_share: float | None
    contributions: list[Contribution]
    together: float = 1.0  # the winner's speed-up over the product of its contributions
    guards: list[Guard]
    pareto: list[ParetoRow]
    trials: list[TrialRow]
    skipped: list[Skipped]
    model_error: dict[str, ModelError]
    notes: list[str]
    space: dict[str, list[Any]]  # knob -> its values
    points: int  # legal combinations
    sampler: str
    confidence: float
    memory_limit_bytes: int | None  # what a trial may take
    evaluation_s: float = 0.0  # seconds per step that evaluations take as the user has them, counted in every speed-up
    saving_s: float = 0.0  # the same of checkpoints
    others: OtherLoad | None = None  # load by other processes, in the middle one of the trials; None where nobody tells
    budget_s: float
    elapsed_s: float
    files: dict[str, str]
    machine: dict[str, Any]
    config: dict[str, Any]

    @property
    def predicted(self) -> bool:
        """True where nothing but the probe was measured."""
        return self.ended == "prediction"
