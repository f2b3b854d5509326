"""The shell's arithmetic, `$(( ... ))`, in whole numbers and with C's operators."""

import operator
import re
from collections.abc import Callable, Mapping

TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|\*\*|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%<>&|^!~()])")
INFIX: Mapping[str, tuple[int, Callable[[int, int], int]]] = {  # operator -> how strongly it binds, and what it does
    "||": (1, lambda a, b: bool(a) or bool(b)), "&&": (2, lambda a, b: bool(a) and bool(b)), "|": (3, operator.or_),
    "^": (4, operator.xor), "&": (5, operator.and_), "==": (6, operator.eq), "!=": (6, operator.ne),
    "<": (7, operator.lt), ">": (7, operator.gt), "<=": (7, operator.le), ">=": (7, operator.ge),
    "<<": (8, lambda a, b: a << b % 64), ">>": (8, lambda a, b: a >> b % 64), "+": (9, operator.add),
    "-": (9, operator.sub), "*": (10, operator.mul),
    "/": (10, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    "%": (10, lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1)), "**": (11, lambda a, b: a ** min(b, 64)),
}  # fmt: skip
PREFIX: Mapping[str, Callable[[int], int]] = {
    "-": operator.neg, "+": operator.pos, "!": operator.not_, "~": operator.invert,
}  # fmt: skip
DEEPEST = 20


class Unknown(Exception):
    """An expression that only a run of the script can evaluate."""


def evaluate(text: str, value_of: Callable[[str], str | None], depth: int = 0) -> int:
    """The value of an expression; `value_of` a name is a text that is one again. `Unknown` if it is no number."""
    tokens = TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or depth > DEEPEST:
        raise Unknown(text)

    def operand() -> int:
        token = tokens.pop(0)
        if token in PREFIX:
            return int(PREFIX[token](operand()))
        if token == "(":
            value = expression(0)
            closed = tokens.pop(0)
            if closed != ")":
                raise Unknown(closed)
            return value
        if token[0].isdigit():
            return int(token, 8) if token[0] == "0" else int(token)
        known = value_of(token) if token.isidentifier() else None
        if known is None:
            raise Unknown(token)
        return evaluate(known, value_of, depth + 1)

    def expression(least: int) -> int:
        value = operand()
        while tokens and INFIX.get(tokens[0], (-1,))[0] > least:
            strength, function = INFIX[tokens.pop(0)]
            value = int(function(value, expression(strength - (strength == 11))))
        return value

    try:
        value = expression(0) if tokens else 0
    except (IndexError, ValueError, ArithmeticError):
        raise Unknown(text) from None
    if tokens:
        raise Unknown(text)
    return value
