"""The types of `compare --json`. Times are seconds; `docs/compare.md` explains every key."""

from typing import Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen

Word = Literal["faster", "slower", "within noise"]


class RatioRow(Frozen):
    """Seconds of one stage, or of the step, in two runs."""

    name: str  # a stage, or `step`
    before_s: float  # of the baseline
    after_s: float  # of the other run
    scale: float  # what `after_s` is multiplied with for equal work
    change: list[float] | None  # ends and middle of `scale * after_s / before_s - 1`; None where there is no interval
    word: Word


class Pair(Frozen):
    """One run held against the baseline."""

    run: str  # as it was named on the command line; a search stands for its winner
    steps: list[int]  # measured steps (cycles of them) of baseline and run
    apart: list[str]  # reasons, as sentences, for which seconds do not tell the two configurations apart
    differences: list[str]  # other sentences to read before the seconds
    changed: dict[str, list[str]]  # key of the configuration -> its two values as text
    rows: list[RatioRow]  # the step, whose interval holds by itself, and stages that ran, whose hold all together
    facts: dict[str, list[float | None]]  # fact -> its two values; None where a run does not tell


class Comparison(Document):
    """Runs held against one of them, the baseline."""

    schema_: Literal["grpo-autotune/compare/1"] = Field(default="grpo-autotune/compare/1", alias="schema")
    confidence: float
    baseline: str
    pairs: list[Pair]
