"""The types of `compare --json`. Times are seconds, shares 0 to 1; `docs/compare.md` explains every key."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import ConfigDict, Field

from grpo_autotune.records.base import Frozen

SCHEMA: Final = "grpo-autotune/compare/1"

Word = Literal["faster", "slower", "within noise"]
RunKind = Literal["probe", "search", "training"]


class ComparedRun(Frozen):
    """One run as it was read."""

    name: str  # as it was named on the command line
    kind: RunKind  # a search stands for its winner
    step_s: float  # median seconds of an optimizer step
    steps: int  # measured steps (cycles of them) that it rests on


class RatioRow(Frozen):
    """Seconds of one stage, or of the step, in two runs."""

    name: str  # a stage, `step`, or `step / completion`
    before_s: float  # of the baseline, as measured
    after_s: float  # of the other run, as measured
    # what `after_s` is multiplied with before the two are compared, 1 where completion lengths are alike: the seconds
    # that the baseline's lengths would have taken
    scale: float = 1.0
    # lower end, middle and upper end of `scale * after_s / before_s - 1`; None where no interval can be given
    change: list[float] | None
    word: Word


class FactRow(Frozen):
    """One fact beside the seconds; None where a run did not tell."""

    name: str
    unit: Literal["count", "share", "bytes", "reward", "rate"]
    before: float | None
    after: float | None


class Difference(Frozen):
    """Something that differs between two runs apart from their seconds, as a sentence."""

    what: Literal["machine", "versions", "data", "lengths", "work", "kind", "load", "record"]
    text: str


class Pair(Frozen):
    """One run held against the baseline."""

    run: ComparedRun
    comparable: bool  # False where machine or data differ, so that seconds do not tell the configurations apart
    differences: list[Difference]  # to be read before the seconds
    changed: dict[str, list[str]]  # key of the configuration -> its two values as text
    step: RatioRow  # the row that the verdict and `--fail-if-slower` go by; its interval holds by itself
    stages: list[RatioRow]  # every stage that ran in either; their intervals hold all together
    facts: list[FactRow]


class Comparison(Frozen):
    """Runs held against one of them, the baseline."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, protected_namespaces=()
    )

    schema_: Literal["grpo-autotune/compare/1"] = Field(default=SCHEMA, alias="schema")
    confidence: float
    baseline: ComparedRun
    pairs: list[Pair]
