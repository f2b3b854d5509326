"""The outcome of importing another framework's configuration, setting by setting, and that of exporting into one."""

from typing import Any, Final, Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen

SCHEMA: Final = "grpo-autotune/imported/1"
EXPORTED: Final = "grpo-autotune/exported/1"

Verdict = Literal["same", "converted", "changes meaning", "no equivalent", "speed only"]
"""A setting means the same here; the same in another unit or another key; something else, said what and how much;
nothing, so it was dropped; or it changes seconds and memory alone."""

STRICT: tuple[Verdict, ...] = ("changes meaning", "no equivalent")
"""Verdicts after which the imported run may learn something else."""


TITLES = {
    "easyr1": "EasyR1", "trl": "TRL", "vlm-r1": "VLM-R1", "r1-v": "R1-V", "unsloth": "Unsloth",
    "deepspeed": "DeepSpeed", "accelerate": "Accelerate",
}  # fmt: skip
"""Name of a framework as its authors write it, where that differs."""


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
    verdict: Verdict
    targets: dict[str, Any] = {}  # key path of a `RunConfig` -> its value
    note: str = ""  # the arithmetic, the size of the difference, or what would be needed


class Imported(Document):
    """One imported configuration. Batch sizes are completions unless they are named prompts."""

    schema_: Literal["grpo-autotune/imported/1"] = Field(default=SCHEMA, alias="schema")
    file: str
    framework: str  # as `--from` has it: `verl`, `ms-swift`
    version: str  # version whose defaults were taken
    version_from: str  # why that one: `--source-version`, the file's own pin, or that it was assumed
    world_size: int  # training processes that the result is written for
    batch: dict[str, int]  # the six numbers of `interop.batch.SixNumbers`
    steps_per_rollout: float  # optimizer steps for each rollout
    rows: list[ImportedRow]  # by line, defaults last
    warnings: list[str]
    config: dict[str, Any]  # the values of a `RunConfig`
    files: dict[str, str] = {}  # name -> text of files that belong beside it, such as a reward's adapter


class ExportedKey(Frozen):
    """A key of the framework that was written."""

    key: str
    before: Any  # as the framework had it, its default where the file left it out
    after: Any

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
    text: str
