"""The outcome of exporting tuned values into another framework's file."""

from typing import Any, Final, Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen

SCHEMA: Final = "grpo-autotune/exported/1"


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

    schema_: Literal["grpo-autotune/exported/1"] = Field(default=SCHEMA, alias="schema")
    original: str
    framework: str
    kind: Literal["file", "patch"]  # the whole text, or a unified diff that nobody has applied
    keys: list[ExportedKey]
    lost: list[LostKey]
    measured: str  # where the values were measured, and that it was not in that framework
    text: str
