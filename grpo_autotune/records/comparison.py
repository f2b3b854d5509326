"""The types of `compare --json`. Times are seconds; `docs/compare.md` explains every key."""

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

    name: str  # a stage, or `step`
    before_s: float  # of the baseline
    after_s: float  # of the other run
    scale: float = 1.0  # what `after_s` is multiplied with for equal work
    # lower end, middle and upper end of `scale * after_s / before_s - 1`; None where there is no interval
    change: list[float] | None
    word: Word


class Pair(Frozen):
    """One run held against the baseline."""

    run: ComparedRun
    comparable: bool  # False where machine or data differ, so that seconds do not tell the configurations apart
    differences: list[str]  # sentences to read before the seconds
    changed: dict[str, list[str]]  # key of the configuration -> its two values as text
    step: RatioRow  # its interval holds by itself
    stages: list[RatioRow]  # every stage that ran in either; their intervals hold all together
    facts: dict[str, list[float | None]]  # fact -> its two values; None where a run does not tell


class Comparison(Frozen):
    """Runs held against one of them, the baseline."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True, protected_namespaces=())

    schema_: Literal["grpo-autotune/compare/1"] = Field(default=SCHEMA, alias="schema")
    confidence: float
    baseline: ComparedRun
    pairs: list[Pair]
