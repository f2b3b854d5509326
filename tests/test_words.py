"""The rules of words, checked on the source: docstrings, rates, and names that say nothing.

The pages of configuration files speak of YAML, where `None` is `null`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from grpo_autotune.cli.main import app

PACKAGE = Path(__file__).parent.parent / "grpo_autotune"

OPENING = re.compile(r"(What|Where|Whether|How|Which|When|Who|Whose|Why|Does|Do|Is|Are|May|Can|That)\b")
"""A docstring opens with a noun phrase or an imperative instead."""
COUNTED = (
    "seconds|milliseconds|ms|s|tokens|completions|trials|steps|bytes|samples|images|prompts|requests|calls|times|once"
)
UNIT = "second|step|token|minute|prompt|group|rank|completion|trial|sequence|micro batch|call"
RATE = re.compile(rf"(\b({COUNTED})|\}}) an? ({UNIT})\b", re.IGNORECASE)
"""Said with "per" instead, in messages too, where a number in braces stands before it."""
NULL = re.compile(r"\bnull\b")
LOCALS = {"found", "own", "there"}
CLASSES = {"Seen", "Given", "Asked", "Standing", "Lab", "Book", "Kept", "Told", "Wanted", "Known"}

COMMAND = re.compile(r"grpo-autotune ([a-z]+)\b")
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
"""A command that a message names is there."""

parsed = cache(ast.parse)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line of the definition, and its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def openings(source: str) -> Iterator[tuple[int, str]]:
    for line, text in docstrings(parsed(source)):
        if OPENING.match(text):
            yield line, text.splitlines()[0]


def nulls(source: str) -> Iterator[tuple[int, str]]:
    for line, text in docstrings(parsed(source)):
        if NULL.search(text):
            yield line, "`null` for `None`"


def rates(source: str) -> Iterator[tuple[int, str]]:
    for match in RATE.finditer(source):
        yield source[: match.start()].count("\n") + 1, match[0]


def names(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in LOCALS:
            yield node.lineno, node.id
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            yield node.lineno, node.name


def commands(source: str) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(source.splitlines(), 1):
        yield from ((line, name) for name in COMMAND.findall(text) if name not in COMMANDS)


def speaks_yaml(path: Path) -> bool:
    return path.is_relative_to(PACKAGE / "config") or path == PACKAGE / "records" / "receipt.py"


@pytest.mark.parametrize("rule", [openings, rates, nulls, names, commands], ids=lambda rule: rule.__name__)
def test_rule_of_words(rule) -> None:
    broken = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {words}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (rule is nulls and speaks_yaml(path))
        for line, words in rule(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "broken", "kept"),
    [
        (openings, '"""Whether it is on."""', '"""True if it is on."""'),
        (openings, 'class A:\n    """What a run costs."""', 'class A:\n    """Cost of a run."""'),
        (rates, 'print(f"{x} useful completions a second")', 'print(f"{x} useful completions per second")'),
        (rates, "# 3 ms a step", "# a step of 3 ms"),
        (rates, 'f"{seconds(x)} a call"', 'f"{seconds(x)} per call"'),
        (nulls, '"""Seconds; null without steps."""', '"""Seconds; None without steps."""'),
        (names, "for own in rows:\n    pass", "print(own)"),
        (names, "if (found := 1):\n    pass", "self.found = 1"),
        (commands, "'grpo-autotune evaluate does it'", "'grpo-autotune infer does it'"),
        (names, "class Seen:\n    pass", "class Sight:\n    pass"),
    ],
)
def test_rules_see_what_they_are_for(rule, broken: str, kept: str) -> None:
    assert list(rule(broken)) and not list(rule(kept))
