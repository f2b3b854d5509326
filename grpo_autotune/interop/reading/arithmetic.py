"""The shell's arithmetic, `$(( ... ))`, in whole numbers."""

import operator
import re
from collections.abc import Callable, Mapping

from tree_sitter import Node

INFIX: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "<<": operator.lshift, ">>": operator.rshift,
    "&": operator.and_, "|": operator.or_, "^": operator.xor, "<": operator.lt, ">": operator.gt, "<=": operator.le,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "&&": lambda a, b: bool(a) and bool(b),
    "||": lambda a, b: bool(a) or bool(b),
    "/": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "%": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
}  # fmt: skip
PREFIX: Mapping[str, Callable[[int], int]] = {
    "-": operator.neg, "+": operator.pos, "!": operator.not_, "~": operator.invert,
}  # fmt: skip
LONGEST = 64


class Unknown(Exception):
    """An expression that only a run of the script can evaluate."""


def evaluate(node: Node, value_of: Callable[[Node], str]) -> int:
    """The value of an expression's node; `value_of` gives the text of a name, number or expansion in it. `Unknown` if
    it is no number."""
    inner = [child for child in node.named_children if child.type != "comment"]
    sign = node.child_by_field_name("operator")
    if node.type == "binary_expression" and sign is not None and len(inner) == 2:
        return _infix(sign.type, evaluate(inner[0], value_of), evaluate(inner[1], value_of))
    if node.type == "unary_expression" and sign is not None and sign.type in PREFIX:
        return int(PREFIX[sign.type](evaluate(inner[-1], value_of)))
    if node.type == "ternary_expression":
        return evaluate(inner[1 if evaluate(inner[0], value_of) else 2], value_of)
    if node.type in ("parenthesized_expression", "arithmetic_expansion", "compound_statement") and inner:
        return evaluate(inner[-1], value_of)
    return number(value_of(node))


def number(text: str) -> int:
    """A number as the shell writes it, nothing being 0."""
    text = text.strip() or "0"
    if match := re.fullmatch(r"([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9]\d*))", text):
        sign, hexadecimal, octal, decimal = match.groups()
        size = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal or 0)
        return -size if sign == "-" else size
    raise Unknown(text)


def _infix(sign: str, left: int, right: int) -> int:
    if sign == "**" and 0 <= right < LONGEST:
        return left**right
    if sign not in INFIX or (sign in ("/", "%") and not right) or (sign in ("<<", ">>") and not 0 <= right < LONGEST):
        raise Unknown(sign)
    return int(INFIX[sign](left, right))
