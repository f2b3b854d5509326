"""The outcome of importing another framework's files, a configuration or a log, and of exporting into one."""

from typing import Any, Final, Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen
from grpo_autotune.records.report import Advice, Change

EXPORTED: Final = "grpo-autotune/exported/1"

Verdict = Literal["same", "converted", "changes", "none", "speed"]
"""A setting means the same here; the same in another unit or another key; something else, said what and how much;
nothing, so it was dropped; or it changes seconds and memory alone."""

VERDICTS: dict[Verdict, str] = {"changes": "changes meaning", "none": "no equivalent", "speed": "speed only"}
"""Verdict -> its words, where they differ."""

STRICT: tuple[Verdict, ...] = ("changes", "none")  # verdicts after which the imported run may learn something else


TITLES = {  # name of a framework as its authors write it, where that differs
    "easyr1": "EasyR1", "trl": "TRL", "vlm-r1": "VLM-R1", "r1-v": "R1-V", "unsloth": "Unsloth",
    "deepspeed": "DeepSpeed", "accelerate": "Accelerate",
}  # fmt: skip


def titled(framework: str, version: str = "") -> str:
    """The framework as its authors write it, with a version."""
    name = TITLES.get(framework, framework)
    return version if version.startswith(name) else f"{name} {version}".rstrip()


class ImportedRow(Frozen):
    """One setting of the source."""

    line: int | None  # line that gives it; None for a default of the framework
    file: str | None = None  # name of the file, where it is not the imported one
    key: str  # the framework's own
    value: Any  # secrets replaced by `***`
    kind: Verdict
    to: dict[str, Any] = {}  # key path of a `RunConfig` -> its value
    why: str = ""  # the arithmetic, the size of the difference, or what would be needed


class Imported(Document):
    """One imported configuration. Batch sizes are completions unless they are named prompts."""

    schema_: Literal["grpo-autotune/imported/1"] = Field(default="grpo-autotune/imported/1", alias="schema")
    file: str
    source: str  # the framework, as `--from` has it: `verl`, `ms-swift`
    version: str  # version whose defaults were taken
    version_from: str  # why that one: `--source-version`, the file's own pin, or that it was assumed
    world_size: int  # training processes that the result is written for
    numbers: dict[str, int]  # G, P, C, E, D and m of `interop.translation.SixNumbers`
    steps_per_rollout: float  # optimizer steps for each rollout
    rows: list[ImportedRow]  # by line, defaults last
    warnings: list[str]
    config: dict[str, Any]  # the values of a `RunConfig`
    files: dict[str, str] = {}  # name -> text of files that belong beside it, such as a reward's adapter


class ExportedKey(Change):
    """A key of the framework that was written; it had its default before where the file left it out."""

    def __str__(self) -> str:
        return f"{self.key} {'unset' if self.before is None else self.before} -> {self.after}"


class LostKey(Frozen):
    """A tuned key of a `RunConfig` that the framework cannot be told."""

    key: str
    value: Any
    why: str


class Exported(Document):
    """A file with tuned values."""

    schema_: Literal["grpo-autotune/exported/1"] = Field(default=EXPORTED, alias="schema")
    original: str
    framework: str
    kind: Literal["file", "patch"]  # the whole text, or a unified diff that nobody has applied
    keys: list[ExportedKey]
    lost: list[LostKey]
    measured: str  # where the values were measured, and that it was not in that framework
    warnings: list[str] = []
    text: str


TRAINING_PASS = "training pass"  # the training forward, backward and optimizer in one timer
ATOMS = (  # stages and parts of stages that a log can tell or keep to itself; `other` is what is left
    *("generation", "policy_logprob.old_policy", "policy_logprob.training_forward", "reference_logprob", "reward"),
    *("backward", "data", "prompt", "tools", "weight_sync", "engine", "sync_wait", "optimizer", "log_save_eval"),
)
State = Literal["known", "lumped", "unknown"]  # lumped: one timer of several stages; unknown: somebody's own


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

    schema_: Literal["grpo-autotune/log/1"] = Field(default="grpo-autotune/log/1", alias="schema")
    file: str
    framework: str  # in words: `verl`, `TRL`
    counted: str  # what a step is: `rollout`, `optimizer step`
    whole: str  # the key, or the arithmetic, that a step's seconds come from
    step_s: float  # the median of rollouts; the mean of optimizer steps, of which only some generate
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
