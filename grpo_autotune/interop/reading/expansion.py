"""The shell's expansions: variables, arrays, `${V:-default}`, arithmetic and quoting, to the words a command gets.

What is not known here is kept as it is written: a command's output, and variables that nothing sets.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from grpo_autotune.interop.reading import marks
from grpo_autotune.interop.source import Word

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


def evaluated(text: str, value_of: Callable[[str], str | None], depth: int = 0) -> int:
    """The value of an expression; `value_of` a name is a text that is one again. `Unknown` if it is no number."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if depth < DEEPEST and (known := value_of(name)) is not None:
                return evaluated(known, value_of, depth + 1)
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


PARSER = Parser(Language(tree_sitter_bash.language()))
ESCAPE = re.compile(r"\\(.)|\n", re.DOTALL)
PARAMETER = re.compile(r"\$\{?(#?)([A-Za-z_]\w*|\d+|[@*#?$!-])(?:\[([^\]]*)\])?(.*?)\}?", re.DOTALL)
OPERATOR = re.compile(r":?[-=+?]|##|#|%%|%|//|/|,,|,|\^\^|\^|:")
NAME = re.compile(r"\$\{?(\w+)\}?")
MISSING = re.compile(marks.UNKNOWN + r"\$\{?(\w+)")
ARRAY = re.compile(r'"\$(?:\{(\w+)(\[@\])\}|\{?(@)\}?)"')


def parsed(text: str) -> tuple[bytes, Node]:
    """A script and its tree, where a plain word stands for each arithmetic: the grammar does not know all."""
    source = text.rstrip("\\ \t\n").encode() + b"\n"
    masked = bytearray(source)
    for start, end in arithmetics(source.decode("latin-1")):
        if b"\n" not in source[start:end]:
            masked[start:end] = b"_" * (end - start)
    for match in re.finditer(rb"(?<=[^\s\\])\\\n(?=[^\s#])", source):  # a word that goes on in the next line
        masked[match.start() : match.end()] = b"__"
    return source, PARSER.parse(bytes(masked)).root_node


def arithmetics(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each `$(( ... ))` that is in no other."""
    end = 0
    for match in re.finditer(r"\$\(\(", text):
        depth, close = 0, match.start() + 1
        while match.start() >= end and close < len(text):
            depth += {"(": 1, ")": -1}.get(text[close], 0)
            close += 1
            if depth == 0:
                if text[close - 2 : close] == "))":
                    yield match.start(), close
                    end = close
                break


@dataclass(frozen=True)
class Field:
    """A word with its signs, and as it is written."""

    text: str
    written: str | None = None

    def word(self) -> Word:
        text, missing = marks.shown(self.text), tuple(MISSING.findall(marks.plain(self.text)))
        return Word(text, marks.line_of(self.text), None if self.written == text else self.written, missing)


@dataclass
class Variables:
    """The variables and arguments of a script, at some place of it."""

    values: dict[str, str | list[Field]] = field(default_factory=dict)
    positional: list[Field] = field(default_factory=list)
    steps: int = 0

    def list(self, name: str) -> list[Field]:
        value = self.positional if name in ("@", "*") else self.values.get(name, [])
        return value if isinstance(value, list) else [Field(value)]

    def text(self, name: str) -> str | None:
        if name == "#":
            return str(len(self.positional))
        if name in ("@", "*"):
            return " ".join(word.text for word in self.positional)
        words = self.positional[int(name) - 1 : int(name)] if name.isdigit() else self.list(name)
        return words[0].text if words else "" if isinstance(self.values.get(name), list) else None


class Expansion:
    """Nodes of one script as texts and words, by its variables."""

    def __init__(self, source: bytes, variables: Variables, line: int | None = None) -> None:
        self.source, self.variables, self.only_line = source, variables, line

    def line(self, byte: int) -> int:
        return self.only_line or self.source.count(b"\n", 0, byte) + 1

    def raw(self, node: Node) -> str:
        return self.source[node.start_byte : node.end_byte].decode()

    def text(self, node: Node | None) -> str:
        return "" if node is None else marks.stored(self.expanded(node))

    def fields(self, node: Node) -> list[Field]:
        raw = self.raw(node)
        array = ARRAY.fullmatch(raw)
        if array:
            return self.variables.list(array[1] or "@")
        words = list(marks.fields(self.expanded(node)))
        if len(words) != 1 or not re.search(r"[$`]", raw) or raw.startswith("'"):
            return [Field(word) for word in words]
        elsewhere = (marks.line_of(words[0]) or 0) < self.line(node.start_byte)
        whole = elsewhere and re.match(r"-|[+~\w.]+=", marks.plain(words[0]))
        return [Field(words[0], None if whole else raw)]

    def expanded(self, node: Node, quoted: bool = False) -> str:
        """A node's text: white space that is in no quotes splits it."""
        sign, raw = marks.at(self.line(node.start_byte)), self.raw(node)
        if node.type in ("simple_expansion", "expansion"):
            return sign + self.parameter(node, quoted)
        if node.type in ("command_substitution", "process_substitution", "arithmetic_expansion"):
            return sign + self.substituted(raw)
        if node.type == "raw_string":
            return marks.quoted(
                re.sub("^|\n", lambda m: m[0] + marks.at(self.line(node.start_byte)), raw[1:-1], count=1)
            )
        if node.type in ("string", "translated_string"):
            return marks.quoted("") + self.between(node, node.start_byte + raw.index('"') + 1, node.end_byte - 1, True)
        return self.between(node, node.start_byte, node.end_byte, quoted)

    def between(self, node: Node, start: int, end: int, quoted: bool) -> str:
        """The text of a node from one byte to another; what is between its children is literal."""
        parts = []
        for child in node.named_children:
            if start <= child.start_byte and child.end_byte <= end and not child.type.endswith("_content"):
                raw = self.raw(child)  # the grammar gives some nodes the white space before them
                begin = child.start_byte + len(raw) - len(raw.lstrip())
                parts += [self.literal(start, begin, quoted), self.expanded(child, quoted)]
                start = child.end_byte
        return "".join([*parts, self.literal(start, end, quoted)])

    def literal(self, start: int, end: int, quoted: bool) -> str:
        """Written text without its escapes, the beginning of each line signed."""
        line = self.line(start) - 1

        def plain(match: re.Match[str]) -> str:
            nonlocal line
            if "\n" in match[0]:
                line += not self.only_line
                return ("" if match[1] else "\n") + marks.at(line + 1)
            return marks.quoted(match[1]) if not quoted else match[1] if match[1] in '$`"\\' else match[0]

        written, text, begin = self.source[start:end].decode(), "", 0
        for place, close in arithmetics(written):
            text += ESCAPE.sub(plain, written[begin:place]) + self.substituted(written[place:close])
            begin = close
        text = marks.at(line + 1) + text + ESCAPE.sub(plain, written[begin:]) if written else ""
        return marks.quoted(text) if quoted and text else text

    def substituted(self, raw: str) -> str:
        try:
            return str(self.computed(raw[3:-2])) if raw.startswith("$((") and raw.endswith("))") else marks.kept(raw)
        except Unknown:
            return marks.kept(raw)

    def computed(self, expression: str) -> int:
        """The value of an arithmetic expression, expanded as in double quotes; `Unknown` if it is not known."""
        source, tree = parsed('x="' + expression.replace('"', "") + '"')
        text = Expansion(source, self.variables, 1).text(tree.named_children[0].child_by_field_name("value"))
        return evaluated(marks.plain(text), self.operand)

    def operand(self, name: str) -> str | None:
        text = self.variables.text(name)
        return text and marks.plain(text)

    def parameter(self, node: Node, quoted: bool) -> str:
        """`$NAME`, `${NAME}`, and what operators and indices make of it."""
        raw = self.raw(node).lstrip()
        match = PARAMETER.fullmatch(raw)
        if match is None:
            return marks.kept(raw)
        prefix, name, index, rest = match.groups()
        sign = OPERATOR.match(rest)
        many = name == "@" or index in ("@", "*")
        value = self.indexed(name, index)
        if prefix == "#" and raw.startswith("${"):
            return str(len(self.variables.list(name)) if many else len(marks.shown(value or "")))
        set_ = value is not None and bool(marks.plain(value) or not rest.startswith(":"))
        kind = sign[0][-1] if sign and sign[0].lstrip(":") in tuple("-=+?") else ""
        if kind in tuple("-=+") and sign is not None and set_ == (kind == "+"):
            start = node.end_byte - len(raw[match.start(4) + len(sign[0]) :].encode())
            value = self.between(node, start, node.end_byte - 1, quoted)
            if kind == "=":
                self.variables.values[name] = marks.stored(value)
            return value
        if kind == "+":
            return ""
        if value is None:
            return "" if many else marks.kept(raw)
        if many:
            texts = [word.text for word in self.variables.list(name)]
            apart = quoted and index != "*"
            joined = " ".join(map(marks.quoted, texts) if apart else texts)
            return marks.quoted(joined) if quoted and not apart else joined
        text = value if sign is None or kind in tuple("-=?") else self.changed(value, sign[0], rest[len(sign[0]) :])
        return marks.kept(raw) if text is None else marks.quoted(text) if quoted else text

    def indexed(self, name: str, index: str | None) -> str | None:
        if index in ("@", "*") or name in ("@", "*"):
            return " ".join(word.text for word in self.variables.list(name)) or None
        if index is None:
            return self.variables.text(name)
        try:
            return self.variables.list(name)[self.computed(index)].text
        except (Unknown, IndexError):
            return None

    def filled(self, text: str) -> str:
        return NAME.sub(lambda match: marks.plain(self.variables.text(match[1]) or ""), text)

    def changed(self, value: str, sign: str, rest: str) -> str | None:
        """A value by `#`, `%`, `,` or `^`; None where only a run can tell."""
        text, pattern = marks.plain(value), re.sub(r"[\"']|\\(?=.)", "", self.filled(rest))
        if marks.is_unknown(text) or marks.is_unknown(pattern):
            return None
        if sign[0] in "#%":
            front, cuts = sign[0] == "#", range(len(text) + 1)
            cuts = cuts if sign in ("#", "%%") else cuts[::-1]
            fits = (cut for cut in cuts if fnmatchcase(text[:cut] if front else text[cut:], pattern))
            cut = next(fits, 0 if front else len(text))
            return text[cut:] if front else text[:cut]
        if sign[0] in ",^":
            change = str.lower if sign[0] == "," else str.upper
            return change(text) if len(sign) == 2 else change(text[:1]) + text[1:]
        return None
