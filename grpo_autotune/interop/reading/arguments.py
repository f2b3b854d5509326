"""Command lines: the launcher's options, the program, and its arguments as settings, which are Hydra's and OmegaConf's
overrides, or the options of HfArgumentParser.

Both keep a value's type as far as its text tells: numbers, true and false, lists, mappings, and Hydra's word for None.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from grpo_autotune.interop.reading.shell import Command
from grpo_autotune.interop.source import Setting, Word

RUNNERS = re.compile(  # first words of a command that may start a training
    r"(.*/)?(python[\d.]*|torchrun|accelerate|deepspeed|uv|srun|ray|nohup|env|exec|time|sudo|conda|poetry|mpirun|numactl"
    r"|timeout|pdsh|xvfb-run|swift|megatron|trl|rl|llamafactory-cli)|\$.*"
)
PROGRAMS = re.compile(r"(.*/)?(swift|megatron|trl|llamafactory-cli|rl)|\$\(which (swift|trl)\)")
"""Programs with a subcommand or arguments of their own, instead of a Python file or module."""
LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")


VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Launch:
    """A command, taken apart."""

    line: int
    program: str  # `verl.trainer.main_ppo`, `src/open_r1/grpo.py`, `swift rlhf`
    arguments: Sequence[Word]
    options: Mapping[str, Setting]  # of torchrun, accelerate and so on
    environment: Mapping[str, Setting]


def launched(command: Command) -> Launch | None:
    """The training that a command starts; None if it starts no program that may be one."""
    words = command.words
    if not words or not RUNNERS.fullmatch(words[0].text):
        return None
    for place, word in enumerate(words):
        text, after = word.text, words[place + 1 :]
        if text == "-m" and after and after[0].text not in LAUNCHERS:
            return _launch(command, after[0].text, after[1:], words[:place])
        if text.endswith(".py") and not text.startswith("-"):
            return _launch(command, text, after, words[:place])
        if PROGRAMS.fullmatch(text) and after and not (place and words[place - 1].text.startswith("--")):
            name = re.sub(r".*/|\$\(which |\)", "", text)
            return _launch(command, f"{name} {after[0].text}", after[1:], words[:place])
    return None


def _launch(command: Command, program: str, arguments: Sequence[Word], before: Sequence[Word]) -> Launch:
    environment = {name: word.setting(word.text) for name, word in command.environment.items()}
    environment |= {m[1]: word.setting(m[2], f"{m[1]}=") for word in before if (m := VARIABLE.fullmatch(word.text))}
    given, _ = options(word for word in before if word.text not in ("--", "-m", *LAUNCHERS))
    return Launch(command.line, program, arguments, given, environment)


OVERRIDE = re.compile(r"(?P<how>\+\+|\+|~|)(?P<key>[A-Za-z_$][\w./@$:-]*)(?:=(?P<value>.*))?", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d[\d_]*|(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][+-]?\d+)?)")
TOKEN = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[\[\]{},:]|(?:\\.|\$\{[^}]*\}|[^\[\]{},:'"\\])+)""")
WORDS: Mapping[str, Any] = {"null": None, "true": True, "false": False}


def overrides(words: Iterable[Word]) -> dict[str, Setting]:
    """Settings of Hydra's overrides: `a.b=c`, `+a=c`, `++a=c`, and `~a`, which leaves None. A later one wins, and a
    mapping is taken apart into its keys."""
    settings: dict[str, Setting] = {}
    for word in words:
        match = OVERRIDE.fullmatch(word.text)
        if match and (match["value"] is not None or match["how"] == "~"):
            value = None if match["how"] == "~" else hydra_value(match["value"])
            settings |= flat(match["key"].replace("/", "."), word.setting(value, f"{match['how']}{match['key']}="))
    return settings


def flat(key: str, setting: Setting) -> dict[str, Setting]:
    """A setting, or one for each key of its mapping, names joined by dots."""
    if not isinstance(setting.value, dict) or not setting.value:
        return {key: setting}
    parts = [flat(f"{key}.{name}", Setting(value, setting.line, setting.file)) for name, value in setting.value.items()]
    return {name: inner for part in parts for name, inner in part.items()}


def hydra_value(text: str) -> Any:
    """The value of an override by Hydra's grammar; text as it stands where that refuses it, such as `$(nproc)`."""
    tokens = TOKEN.findall(text)
    if text[:1] not in "[{'\"" or "".join(tokens).replace(" ", "") != text.replace(" ", ""):
        return scalar(text.strip(), WORDS)
    try:
        value = _parsed(tokens)
    except (IndexError, ValueError):
        return text
    return text if tokens else value


def _parsed(tokens: list[str]) -> Any:
    token = tokens.pop(0).strip()
    if token not in ("[", "{"):
        return re.sub(r"\\(['\"])", r"\1", token[1:-1]) if token[:1] in ("'", '"') else scalar(token, WORDS)
    items: list[Any] = []
    while tokens[0] not in ("]", "}"):
        items.append(_parsed(tokens))
        if token == "{" and tokens.pop(0) == ":":
            items[-1] = (items[-1], _parsed(tokens))
        if tokens[0] == ",":
            tokens.pop(0)
    tokens.pop(0)
    return dict(items) if token == "{" else items


def options(words: Iterable[Word]) -> tuple[dict[str, Setting], list[Word]]:
    """Settings of HfArgumentParser's options, and the words before the first of them. `--a b`, `--a=b`, `--a` alone
    for true, `--no_a` for false, several words as a list, JSON as a mapping or list; `-` in a name is `_`."""
    settings: dict[str, Setting] = {}
    first: list[Word] = []
    option, values = None, first
    for word in words:
        if re.match(r"--?[A-Za-z]", word.text):
            name, equals, value = word.text.partition("=")
            written = word.written and word.written.partition("=")[2]
            option, values = replace(word, text=name), [Word(value, word.line, written)] if equals else []
        else:
            values.append(word)
        if option is not None:
            settings |= _option(option, values)
    return settings, first


def _option(option: Word, words: list[Word]) -> dict[str, Setting]:
    name = option.text.lstrip("-").replace("-", "_")
    if not words:
        off = name.startswith("no_") and name != "no_cuda"
        return {name.removeprefix("no_") if off else name: Setting(not off, option.line)}
    values = [option_value(word.text) for word in words]
    written = " ".join(word.written or word.text for word in words) if any(word.written for word in words) else None
    return {name: Setting(values[0] if len(values) == 1 else values, option.line or words[0].line, text=written)}


def option_value(text: str) -> Any:
    """The value of an option: true or false, a number, JSON, else text."""
    if text[:1] in ("{", "["):
        with suppress(json.JSONDecodeError):
            return json.loads(text)
    return scalar(text, {"true": True, "false": False})


def scalar(text: str, words: Mapping[str, Any]) -> Any:
    """A number, one of the words (in any case), or the text."""
    if NUMBER.fullmatch(text):
        kind: Callable[[str], Any] = int if re.fullmatch(r"[+-]?[\d_]+", text) else float
        return kind(text) if not re.match(r"[+-]?0\d", text) else text
    return words.get(text.lower(), text)
