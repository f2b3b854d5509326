"""A configuration of another framework as it was read: each setting, and the line it stands on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One value of a source, and where it stands."""

    value: Any  # plain: text, number, true or false, list, mapping, None
    line: int | None = None  # line of `file`, from 1; None for the framework's default
    file: str | None = None  # name of the file where it is not the source itself (a base YAML beside a script)
    text: str | None = None  # as written, where that differs: `${BATCH:-512}`; same as `value` if only a run can tell


@dataclass(frozen=True)
class Source:
    """The settings of one file, without defaults, by the framework's own keys, nested ones joined by dots."""

    framework: str
    path: Path
    settings: Mapping[str, Setting]
    environment: Mapping[str, Setting] = field(default_factory=dict)  # variables that the file sets or exports
    launch: Mapping[str, Setting] = field(default_factory=dict)  # options of torchrun or accelerate, and the like
    program: str | None = None  # module or script that is started: `verl.trainer.main_ppo`, `src/open_r1/grpo.py`
    hints: Mapping[str, str] = field(default_factory=dict)  # versions that the file pins: `trl` -> `0.22.2`
    warnings: tuple[str, ...] = ()


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
