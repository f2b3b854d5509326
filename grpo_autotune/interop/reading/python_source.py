"""Python scripts and notebooks, read and never run: the arguments of the calls that configure a training.

An argument's value is a literal, or simple arithmetic on literals and on names that one was assigned to; of anything
else the source text is kept, as value and as text of its `Setting`.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.beside import text_of
from grpo_autotune.interop.source import Setting

PIN = re.compile(r"\b(trl|verl|unsloth|transformers|vllm|ms-swift)==(\d[\w.]*)")
OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: lambda none, value: -value,
    ast.UAdd: lambda none, value: +value, ast.Not: lambda none, value: not value,
}  # fmt: skip
MAGIC = re.compile(r"(?m)^([ \t]*)[!%?](?:.*\\\n)*.*$")
MOST_LEFT_OUT = 20
WRONG = (TypeError, ValueError, KeyError, ArithmeticError)


@dataclass(frozen=True)
class Call:
    """A call of a script. Arguments without a name are "0", "1" and so on."""

    name: str  # as written: `GRPOConfig`, `FastVisionModel.from_pretrained`
    arguments: dict[str, Setting]
    line: int


@dataclass
class Script:
    """What a script or notebook says."""

    calls: list[Call] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)  # packages, without their parts
    environment: dict[str, Setting] = field(default_factory=dict)  # what it puts into `os.environ`
    pins: dict[str, str] = field(default_factory=dict)  # package -> version, of its `pip install` lines
    docstring: range | None = None  # its lines, from 1
    warnings: list[str] = field(default_factory=list)

    def called(self, pattern: str) -> list[Call]:
        """Calls whose whole name matches a regular expression, in the order of their lines."""
        return [call for call in self.calls if re.fullmatch(pattern, call.name)]


def calls(path: Path, environment: Mapping[str, str] | None = None) -> list[Call]:
    """The calls of a script or notebook."""
    return read(path, environment).calls


def read(path: Path, environment: Mapping[str, str] | None = None) -> Script:
    """All of a script or notebook; `environment` is what `os.environ` gives it. ConfigError if it is no Python."""
    text = text_of(path)
    script = Script(pins=dict(PIN.findall(text)))
    names: dict[str, Any] = {}
    for cell, source in cells(path, text):
        tree, left_out = _parsed(source, f"{path.name}, {cell}" if cell else path.name)
        script.warnings += [f"{cell + ', ' if cell else ''}lines {lines} are not read: no Python" for lines in left_out]
        if ast.get_docstring(tree) and script.docstring is None:
            script.docstring = range(tree.body[0].lineno, (tree.body[0].end_lineno or 1) + 1)
        _Reader(script, cell, names, environment or {}).visit(tree)
    return script


def _parsed(source: str, where: str) -> tuple[ast.Module, list[str]]:
    """The tree of a source without the statements that are no Python (of this version), and their lines."""
    lines, left_out = source.split("\n"), list[str]()
    while True:
        try:
            return ast.parse("\n".join(lines)), left_out
        except (SyntaxError, RecursionError, ValueError) as error:
            line = min(getattr(error, "lineno", None) or 0, len(lines))
            if not line or len(left_out) >= MOST_LEFT_OUT:
                raise ConfigError("this Python cannot be read", where=f"{where}, line {line}") from None
            starts = [n for n, text in enumerate(lines) if re.match(r"[A-Za-z@]", text)]
            start = max((n for n in starts if n < line), default=0)
            end = min((n for n in starts if n >= line), default=len(lines))
            left_out.append(f"{start + 1} to {end}")
            lines[start:end] = [""] * (end - start)


def cells(path: Path, text: str) -> Iterator[tuple[str | None, str]]:
    """Name and source of each cell of code; a script is one, without a name."""
    if path.suffix != ".ipynb":
        yield None, text
        return
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) if cell["cell_type"] == "code" else "" for cell in cells]
    except (ValueError, KeyError, TypeError):
        raise ConfigError("this is no notebook", where=path.name) from None
    for number, source in enumerate(sources, 1):
        if not re.match(r"%%(bash|sh|writefile|html|javascript|script)", source):
            yield f"cell {number:0{len(str(len(sources)))}}", MAGIC.sub(_blank, source)


def _blank(magic: re.Match[str]) -> str:
    """A statement that does nothing, and as many lines as the notebook's command."""
    return f"{magic[1]}pass" + "\n" * magic[0].count("\n")


class _Reader(ast.NodeVisitor):
    """Calls in the order of their lines, with the names that are known there."""

    def __init__(self, script: Script, cell: str | None, names: dict[str, Any], environment: Mapping[str, str]) -> None:
        self.script, self.cell, self.names, self.environment = script, cell, names, environment

    def visit_Import(self, node: ast.Import) -> None:
        self.script.imports |= {alias.name.partition(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.script.imports.add((node.module or "").partition(".")[0])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self.assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self.names.pop(ast.unparse(node.target), None)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        name = ast.unparse(target)
        base = self.names.get(name.partition(".")[0])
        variable = re.fullmatch(r"os\.environ\[['\"](\w+)['\"]\]", name)
        if variable:
            self.script.environment[variable[1]] = self.setting(value)
        elif isinstance(target, ast.Attribute) and isinstance(base, Call):
            base.arguments[target.attr] = self.setting(value)
        elif isinstance(value, ast.Call) and not self.known(value):
            self.names[name] = next((call for call in reversed(self.script.calls) if call.line == value.lineno), None)
        elif self.known(value):
            self.names[name] = self.value(value)
        else:
            self.names.pop(name, None)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        arguments = {str(place): self.setting(value) for place, value in enumerate(node.args)}
        for keyword in node.keywords:
            if keyword.arg:
                arguments[keyword.arg] = self.setting(keyword.value)
            elif self.known(keyword.value) and isinstance(spread := self.value(keyword.value), dict):
                arguments |= {str(key): Setting(value, node.lineno, self.cell) for key, value in spread.items()}
        self.script.calls.append(Call(ast.unparse(node.func), arguments, node.lineno))

    def setting(self, node: ast.expr) -> Setting:
        written = ast.unparse(node)
        try:
            plain = ast.literal_eval(node) is not ...
        except WRONG:
            plain = False
        value = self.value(node) if self.known(node) else self.parts(node)
        return Setting(value, node.lineno, self.cell, None if plain else written)

    def parts(self, node: ast.expr) -> Any:
        """A list or mapping with what is known of it; else the source text."""
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item) if self.known(item) else self.parts(item) for item in node.elts]
        return ast.unparse(node)

    def known(self, node: ast.expr) -> bool:
        try:
            return not isinstance(self.value(node), Call)
        except WRONG:
            return False

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; one of `WRONG` if it is not known."""
        if isinstance(node, ast.Name):
            return self.names[node.id]
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return {self.value(key): self.value(value) for key, value in _items(node)}
        if isinstance(node, ast.BinOp):
            left, right = self.value(node.left), self.value(node.right)
            if not all(isinstance(side, int | float) or isinstance(node.op, ast.Add) for side in (left, right)):
                raise ValueError
            return OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](None, self.value(node.operand))
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.value(part)) for part in node.values)
        if isinstance(node, ast.FormattedValue) and node.format_spec is None:
            return self.value(node.value)
        return self.called(node) if isinstance(node, ast.Call) else ast.literal_eval(node)

    def called(self, node: ast.Call) -> Any:
        """Value of `dict(...)`, `int(...)`, `float(...)`, `str(...)`, and of a variable of the environment."""
        name = ast.unparse(node.func)
        given = [self.value(argument) for argument in node.args]
        if name == "dict" and not given:
            return {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if name in ("int", "float", "str") and len(given) == 1:
            return {"int": int, "float": float, "str": str}[name](given[0])
        if name in ("os.environ.get", "os.getenv") and given:
            return self.environment.get(given[0], *given[1:2]) if len(given) > 1 else self.environment[given[0]]
        raise ValueError(name)


def _items(node: ast.Dict) -> Iterator[tuple[ast.expr, ast.expr]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            raise ValueError
        yield key, value
