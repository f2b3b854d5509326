"""The shell's arithmetic, `$(( ... ))`, in whole numbers, by Python's grammar."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

SIGNS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: lambda a, b: a ** min(b, 64),
    ast.Div: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    ast.Mod: lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1), ast.LShift: lambda a, b: a << b % 64,
    ast.RShift: lambda a, b: a >> b % 64, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.BitAnd: operator.and_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le,
    ast.GtE: operator.ge, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Invert: operator.invert, ast.And: lambda *values: all(values), ast.Or: lambda *values: any(values),
}  # fmt: skip
DEEPEST = 20


class Unknown(Exception):
    """An expression that only a run of the script can evaluate."""


def evaluate(text: str, value_of: Callable[[str], str | None], depth: int = 0) -> int:
    """The value of an expression; `value_of` a name is a text that is one again. `Unknown` if it is no number."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if depth < DEEPEST and (known := value_of(name)) is not None:
                return evaluate(known, value_of, depth + 1)
            case ast.UnaryOp(op=sign, operand=one):
                return int(SIGNS[type(sign)](value(one)))
            case ast.BinOp(left=one, op=sign, right=other) | ast.Compare(left=one, ops=[sign], comparators=[other]):
                return int(SIGNS[type(sign)](value(one), value(other)))
            case ast.BoolOp(op=sign, values=values):
                return int(SIGNS[type(sign)](*map(value, values)))
        raise Unknown(text)

    words = re.sub(r"!(?!=)", " not ", " ".join(text.split()).replace("&&", " and ").replace("||", " or "))
    try:
        if not re.fullmatch(r"[\w\s()+*/%<>=!&|^~-]*", text):
            raise Unknown(text)
        return value(ast.parse(re.sub(r"\b0+(?=\d)", "0o", words).strip() or "0", mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ArithmeticError, RecursionError, MemoryError):
        raise Unknown(text) from None
