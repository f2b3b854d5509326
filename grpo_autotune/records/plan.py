"""The types of `plan --json`. Times are seconds, sizes bytes, shares 0 to 1; `docs/plan.md` explains every key."""

from typing import Any, Literal, NamedTuple

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen


class Figure(NamedTuple):
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float
    how: Literal["measured", "predicted"] = "predicted"

    def times(self, factor: float) -> "Figure":
        return Figure(factor * self.value, factor * self.low, factor * self.high, self.how)


class Occasion(Frozen):
    """Evaluations, or checkpoints."""

    name: Literal["evaluate", "save"]
    every: int  # optimizer steps between two; 0 where it is off
    times: int  # how often it happens in the run
    once_s: Figure
    share: float  # of the run's time
    total_s: Figure  # of that run


class Choice(Frozen):
    """One row of a table: the configuration with another value, or another model under it."""

    name: str
    knobs: dict[str, Any]
    image_tokens: float | None
    sample_s: Figure
    total_s: Figure
    speed: float  # seconds of a sample now over those of this row
    peak_bytes: Figure  # at worst
    fits: bool
    remedy: str | None  # the first change that would make it fit; None where it does, or none is known


class Pass(NamedTuple):
    """Passes of one kind for a sample; a backward pass counts as two forward ones."""

    name: str
    rows: float  # of prompt and completion that go through the model
    tokens: float  # of all of them
    shared_tokens: float  # the same where a group's prompt goes through once
    shares: bool  # whether a speed-up does that here


class Plan(Document):
    """The plan of one run."""

    schema_: Literal["grpo-autotune/plan/1"] = Field(default="grpo-autotune/plan/1", alias="schema")
    confidence: float
    source: str
    notes: list[str]
    samples: int
    steps: int
    step_s: Figure
    sample_s: Figure
    total_s: Figure
    ends: list[str]
    occasions: list[Occasion]
    cadences: list[Occasion]
    memory_bytes: int | None
    tables: dict[str, list[Choice]]
    budgets: dict[str, dict[str, int | None]]
    passes: list[Pass]
    supervised_tokens: float
