"""Commands that start a training: the launcher's options, the program, and its arguments."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_autotune.interop.reading.arguments import options
from grpo_autotune.interop.reading.shell import Command
from grpo_autotune.interop.reading.words import Word
from grpo_autotune.interop.source import Setting

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
