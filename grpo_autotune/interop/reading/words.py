"""Words of a command line, each with the line it is written on."""

from dataclasses import dataclass
from typing import Any

from grpo_autotune.interop.source import Setting


@dataclass(frozen=True)
class Word:
    """One argument as a program receives it."""

    text: str
    line: int | None = None
    written: str | None = None  # as in the file, where that differs: `${BATCH:-512}`
    missing: tuple[str, ...] = ()  # variables in it that nothing sets

    def setting(self, value: Any, prefix: str = "") -> Setting:
        """The value that this word gives; `prefix` is what stands before the value in the word, such as `lr=`."""
        return Setting(value, self.line, text=self.written and self.written.removeprefix(prefix))
