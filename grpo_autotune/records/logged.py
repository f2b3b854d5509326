"""The report of another framework's log. Times are seconds, shares 0 to 1; `docs/interop.md` explains it."""

from typing import Final, Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen
from grpo_autotune.records.report import Advice

SCHEMA: Final = "grpo-autotune/log/1"
TRAINING_PASS = "training pass"
"""Row of the training forward, backward and optimizer together, where a log has one timer for them."""
ATOMS = (
    *("generation", "policy_logprob.old_policy", "policy_logprob.training_forward", "reference_logprob", "reward"),
    *("backward", "data", "prompt", "tools", "weight_sync", "engine", "sync_wait", "optimizer", "log_save_eval"),
)
"""Stages and parts of stages that a log can tell or keep to itself; `other` is what is left."""
State = Literal["known", "lumped", "unknown"]
"""Lumped: one timer holds several stages, and nobody can tell them apart. Unknown: a timer of somebody's own."""


class LoggedStage(Frozen):
    """One row of the step, as the log's timers cut it."""

    name: str  # a stage of `STAGES`, `training pass`, `training forward`, or the log's own name for it
    state: State
    holds: list[str]  # those stages, or parts (`policy_logprob.old_policy`)
    keys: list[str]  # keys of the log that its seconds are the sum of; those behind a minus are taken off
    self_s: float  # `share * step_s`
    share: float  # its part of all seconds of the steps
    spread: float  # half the interquartile range over steps
    per_step_s: list[float]  # of each step used


class LoggedFact(Frozen):
    """One other quantity: its mean over the steps that have it."""

    value: float
    key: str  # key of the log


class LogReport(Document):
    """Seconds by stage of another framework's run. A step is what the log counts: a rollout with all of its optimizer
    steps in verl and EasyR1, an optimizer step elsewhere. Where the steps cannot be split, `stages` is empty."""

    schema_: Literal["grpo-autotune/log/1"] = Field(default=SCHEMA, alias="schema")
    file: str
    framework: str  # in words: `verl`, `TRL`
    counted: str  # what a step is: `rollout`, `optimizer step`
    whole: str  # the key, or the arithmetic, that a step's seconds come from
    step_s: float  # median
    step_spread_s: float
    steps: list[int]  # numbers of the steps used
    lines: list[int]  # line of the file (entry of a JSON list) that each stands on
    step_seconds: list[float]
    cycle: int = 1
    stages: list[LoggedStage]  # they sum to the step
    absent: list[str]  # stages and parts that no row holds
    beside: dict[str, LoggedFact] = {}  # timers that are no part of the step: saving outside of it, per-request means
    facts: dict[str, LoggedFact] = {}  # lengths, rewards, rates
    checks: list[str] = []  # the configuration's batch and GPUs against those that the log recovers
    skipped: dict[str, int] = {}  # reason -> lines or steps left out
    warnings: list[str] = []
    bound: str
    verdict: list[Advice] = []
