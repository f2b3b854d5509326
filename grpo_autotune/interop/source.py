"""A configuration of another framework as it was read: each setting, and the line it stands on; without its secrets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One value of a source, and where it stands."""

    value: Any  # plain: text, number, true or false, list, mapping, None
    line: int | None = None  # line of `file`, from 1; None for the framework's default
    file: str | None = None  # name of the file where it is not the source itself (a base YAML beside a script)
    text: str | None = None  # as written, where that differs: `${BATCH:-512}`; same as `value` if only a run can tell
    open: frozenset[str] = frozenset()  # keys of a mapping whose values, or parts of them, only a run can tell


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


HIDDEN = "***"
NAME = re.compile(  # names of variables and keys, whole, whose text nobody is shown: not `prompt_key` and `pad_token`
    r"(?!.*(MAX|MIN|NUM|PAD|EOS|BOS|IMAGE|VIDEO|PROMPT|ANSWER|DATA|FN)_?(KEY|TOKEN))[A-Z0-9_]*(KEY|TOKEN|AUTH)"
    r"|(?i:.*(secret|passw(or)?d|credential).*|token"
    r"|(.*[._-])?(api|access|auth|private|hub|hf|wandb|swanlab|login|openai|judge)_?(key|token))s?"
)
TEXT = re.compile(
    r"(?P<before>://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|(?P<named>(?i:(?:api|access|auth|secret)[_-]?key|password|passwd|secret|bearer|[A-Z_]*_TOKEN|(?:--|[?&])token|login\((?:key|token))[\"']?\s*[=:\s]\s*[\"']?)"
    r"(?![$<{*])[^\s\"',;&]{6,}"
    r"|\b(?:hf_|sk-|ghp_|github_pat_|AKIA|AIza|xox[bp]-|glpat-|nvapi-|eyJ[\w-]+\.)[\w-]{12,}|(?<=https://)[\w-]{16,}(?=@)"
)
HEX = re.compile(r"\b[0-9a-f]{40}\b")  # a key of Weights & Biases; or a commit, where the name says so


def redacted(source: Source) -> Source:
    """The source without its secrets."""
    return replace(
        source, settings=hidden_settings(source.settings), environment=hidden_settings(source.environment),
        launch=hidden_settings(source.launch), hints={name: hidden(text, name) for name, text in source.hints.items()},
        warnings=tuple(hidden_text(text) for text in source.warnings),
    )  # fmt: skip


def hidden_settings(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings without their secrets, in values and in the text they were written as."""
    return {
        key: replace(setting, value=hidden(setting.value, key), text=hidden(setting.text, key))
        for key, setting in settings.items()
    }


def hidden(value: Any, key: str = "") -> Any:
    """The value of a key with `***` for each secret in it, however deep."""
    if isinstance(value, Mapping):
        return {name: hidden(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(inner, key) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    last = key.rpartition(".")[2]
    if NAME.fullmatch(last) and not re.fullmatch(r"\$\{?\w+\}?|(?i:true|false|none|null)", value):
        return HIDDEN
    return hidden_text(value, keep_hex=bool(re.search(r"(?i)revision|commit|sha|branch", key)))


def hidden_text(text: str, keep_hex: bool = False) -> str:
    """The text with `***` for each secret in it that its form or the word before it gives away."""
    text = TEXT.sub(lambda match: f"{match['before'] or match['named'] or ''}{HIDDEN}", text)
    return text if keep_hex else HEX.sub(HIDDEN, text)


def shorter(text: str, most: int = 60) -> str:
    """The text on one line, for a warning."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
