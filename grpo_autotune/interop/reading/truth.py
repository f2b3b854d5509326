"""The truth of the shell's tests: `[ ... ]`, `[[ ... ]]`, `test` and `(( ... ))`; None where only a run can tell."""

import re
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase

from tree_sitter import Node

from grpo_autotune.interop.reading import marks
from grpo_autotune.interop.reading.expansion import Expansion, Unknown, evaluated

NVIDIA = re.compile(r"(?i)nvidia|cuda|\bgpu\b")
NUMBERS = {"-eq": "==", "-ne": "!=", "-gt": ">", "-lt": "<", "-ge": ">=", "-le": "<="}
JOINTS = (({"||", "-o"}, True), ({"&&", "-a"}, False))  # between parts, and the truth that decides the whole


class Truth:
    """Tests by the variables of a script; `warn` tells of one whose outcome is taken for granted."""

    def __init__(self, expand: Expansion, warn: Callable[[Node, str], None]) -> None:
        self.expand, self.warn = expand, warn

    def of(self, nodes: list[Node], bracket: str = "[") -> bool | None:
        """The truth of a test's words; in `[[` texts compare with patterns."""
        signs = [self.expand.raw(node) for node in nodes]
        for joints, decides in JOINTS:
            places = [
                n for n, sign in enumerate(signs) if sign in joints and signs[:n].count("(") == signs[:n].count(")")
            ]
            if places:
                state = self.of(nodes[: places[0]], bracket)
                return state if bool(state) == decides else self.of(nodes[places[0] + 1 :], bracket)
        if signs[:1] == ["!"]:
            state = self.of(nodes[1:], bracket)
            return None if state is None else not state
        if signs[:1] == ["("]:
            return self.of(nodes[1:-1], bracket)
        if len(nodes) == 2:
            return {"-z": not self.tested(nodes[1]), "-n": bool(self.tested(nodes[1]))}.get(signs[0])
        if len(nodes) > 2:
            return self.compared(nodes, signs[1], bracket == "[[")
        return bool(nodes and self.tested(nodes[0]))

    def compared(self, nodes: list[Node], sign: str, pattern: bool) -> bool | None:
        left, right = self.tested(nodes[0]), "".join(self.tested(node) for node in nodes[2:])
        if sign in ("=", "==", "!="):
            return self.alike(nodes[0], left, right, pattern) == (sign != "!=")
        if sign == "=~":
            with suppress(re.error):
                return None if marks.is_unknown(left + right) else bool(re.search(self.expand.raw(nodes[2]), left))
        with suppress(Unknown, KeyError):
            return bool(evaluated(f"({left or 0}){NUMBERS[sign]}({right or 0})", self.expand.operand))
        return None

    def counted(self, expression: str) -> bool | None:
        """True unless an arithmetic expression is 0; None if it is not known."""
        with suppress(Unknown):
            return bool(self.expand.computed(expression))
        return None

    def tested(self, node: Node) -> str:
        """A text in a test: nothing for a variable that nothing sets."""
        text, raw = marks.plain(self.expand.text(node)), self.expand.raw(node).strip("\"'")
        unset = marks.is_unknown(text) and marks.shown(text) == raw and re.fullmatch(r"\$\w+|\$\{\w+\}", raw)
        return "" if unset else text

    def alike(self, node: Node, left: str, right: str, pattern: bool = True) -> bool:
        """True if a text is another; one that only a run can tell is taken as that of NVIDIA's GPUs."""
        if not marks.is_unknown(left):
            return fnmatchcase(left, right) if pattern else left == right
        same = bool(NVIDIA.fullmatch(right))
        taken = right if same else f"not {right}"
        self.warn(node, f"`{shorter(self.expand.raw(node))}` depends on the machine: taken as {taken}")
        return same


def parts(node: Node) -> list[Node]:
    """The words of a test."""
    if node.type not in ("binary_expression", "unary_expression", "parenthesized_expression"):
        return [node]
    return [part for child in node.children for part in parts(child)]


def shorter(text: str, most: int = 60) -> str:
    """The text on one line, for a warning."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
