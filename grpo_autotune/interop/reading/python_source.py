"""Python scripts and notebooks, read and never run: the arguments of the calls that configure a training.

A value is a literal, or simple arithmetic on literals and on names that one was assigned to; else the source text.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.files import text_of
from grpo_autotune.interop.source import Setting, hidden, shorter

PIN = re.compile(r"\b(trl|verl|unsloth|transformers|vllm|ms-swift)==(\d[\w.]*)")
OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: lambda left, right: +left * +right,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: lambda left, right: _remainder(left, right),
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda one, many: one in many,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
OF_PROCESSOR = ("chat_template", "max_pixels", "min_pixels")  # what a script sets on its tokenizer or processor
KINDS: Mapping[str, Callable[..., Any]] = {"int": int, "float": float, "str": str}
OF_OPTION = ("default", "action", "dest", "required")
PARSED = re.compile(r"(.*\.)?(parse|get)_(known_)?(args|arguments)")  # calls that make the values of argparse
MAGIC = re.compile(r"(?m)^([ \t]*)[!%?](?:.*\\\n)*.*$")
MOST_LEFT_OUT, MOST_SAID, LONGEST_TEXT = 20, 5, 100_000
SETTING = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For)
WRONG = (TypeError, ValueError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Call:
    """A call of a script. Arguments without a name are "0", "1" and so on."""

    name: str  # as written: `GRPOConfig`, `FastVisionModel.from_pretrained`
    arguments: dict[str, Setting]
    line: int


@dataclass
class Script:
    """The calls of a script or notebook, and all else that is read of it."""

    calls: list[Call] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)  # packages, without their parts
    environment: dict[str, Setting] = field(default_factory=dict)  # what it puts into `os.environ`
    options: dict[str, Any] = field(default_factory=dict)  # of argparse, with their defaults
    usual: dict[str, Any] = field(default_factory=dict)  # those whose defaults were taken
    pins: dict[str, str] = field(default_factory=dict)  # package -> version, of its `pip install` lines
    docstring: range | None = None  # its lines, from 1
    warnings: list[str] = field(default_factory=list)

    def called(self, pattern: str) -> list[Call]:
        return [call for call in self.calls if re.fullmatch(pattern, call.name)]


def read(path: Path, environment: Mapping[str, str] | None = None) -> Script:
    """All of a script or notebook; `environment` is what `os.environ` gives it. ConfigError if it is no Python."""
    text = text_of(path)
    script = Script(pins=dict(PIN.findall(text)))
    names: dict[str, Any] = {}
    for cell, source in cells(path, text):
        tree, left_out = parsed(source, f"{path.name}, {cell}" if cell else path.name)
        script.warnings += [f"{cell + ', ' if cell else ''}lines {lines} are not read: no Python" for lines in left_out]
        if ast.get_docstring(tree) and script.docstring is None:
            script.docstring = range(tree.body[0].lineno, (tree.body[0].end_lineno or 1) + 1)
        script.options |= _options(tree)
        _Reader(script, cell, names, environment or {}).visit(tree)
    if script.usual:
        said = [shorter(f"{name} {hidden(value, name)}") for name, value in script.usual.items()]
        more = f" and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else ""
        values = ", ".join(said[:MOST_SAID]) + more
        script.warnings.append(f"options of its command are taken at their defaults (--env NAME=VALUE): {values}")
    return script


def parsed(source: str, where: str) -> tuple[ast.Module, list[str]]:
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
            if not any(lines):
                raise ConfigError("this is no Python", where=where) from None


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
            yield (
                f"cell {number:0{len(str(len(sources)))}}",
                MAGIC.sub(lambda m: f"{m[1]}pass" + "\n" * m[0].count("\n"), source),
            )


def _options(tree: ast.AST) -> dict[str, Any]:
    """Options of argparse that a command may leave out, by the names of their values, with their defaults."""
    options: dict[str, Any] = {}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    for node in calls:
        with suppress(*WRONG):
            options |= dict([_option(node)] if ast.unparse(node.func).endswith(".add_argument") else ())
    for word in [word for node in calls if ast.unparse(node.func).endswith(".set_defaults") for word in node.keywords]:
        for name in [word.arg] if word.arg else list(options):
            options.pop(name, None)
        with suppress(*WRONG):
            options |= {word.arg: ast.literal_eval(word.value)} if word.arg else {}
    return options


def _option(node: ast.Call) -> tuple[str, Any]:
    """An option's name and default; ValueError or the like where it has none that can be told."""
    flags = [str(ast.literal_eval(flag)) for flag in node.args]
    given = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg in OF_OPTION}
    kind = next((ast.unparse(word.value) for word in node.keywords if word.arg == "type"), "str")
    if given.get("required") or None in (word.arg for word in node.keywords) or not flags or flags[0][:1] != "-":
        raise ValueError
    name = next((flag for flag in flags if flag.startswith("--")), flags[0])
    usual = given.get("default", {"store_true": False, "store_false": True}.get(given.get("action", "")))
    value = KINDS[kind](usual) if isinstance(usual, str) else usual
    return given.get("dest") or name.lstrip("-").replace("-", "_"), value


class Unknown(str):
    """Source text of an expression whose value is not known before the script runs."""


class _Reader(ast.NodeVisitor):
    """Calls in the order of their lines, with the names that are known there."""

    def __init__(self, script: Script, cell: str | None, names: dict[str, Any], environment: Mapping[str, str]) -> None:
        self.script, self.cell, self.names, self.environment = script, cell, names, environment

    def visit_Import(self, node: ast.Import) -> None:
        self.script.imports |= {alias.name.partition(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.script.imports.add((node.module or "").partition(".")[0])

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        self.generic_visit(node)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if node.value is not None:
                self.assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_Assign(node)

    def visit_If(self, node: ast.If) -> None:
        """The branch that is taken; where that is not known both, and the names that they set are unknown."""
        test = self.value(node.test)
        self.visit(node.test)
        for statement in (
            [*node.body, *node.orelse] if isinstance(test, Unknown) else node.body if test else node.orelse
        ):
            self.visit(statement)
        if isinstance(test, Unknown):
            self.forget_set(node)

    def forget_set(self, node: ast.AST) -> None:
        """Names that a part of a script may or may not have set are not known from here on."""
        for part in [part for part in ast.walk(node) if isinstance(part, SETTING)]:
            self.forget(*getattr(part, "targets", ()), *filter(None, [getattr(part, "target", None)]))

    def visit_Try(self, node: ast.AST) -> None:
        self.generic_visit(node)
        self.forget_set(node)

    def visit_While(self, node: ast.AST) -> None:
        self.forget_set(node)
        self.visit_Try(node)

    def visit_For(self, node: ast.For) -> None:
        self.visit_While(node)

    def forget(self, *nodes: ast.AST) -> None:
        """Names, attributes and arguments of trees are not known from here on; the object of an attribute still is."""
        for node in nodes:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node)
            if not isinstance(node, ast.Name | ast.arg | ast.Attribute):
                self.forget(*ast.iter_child_nodes(node))
            elif not self.keep(node, Setting(name, node.lineno, self.cell, name)):
                self.names[name] = Unknown(name)

    def keep(self, target: ast.AST, setting: Setting) -> bool:
        """True where an attribute is a setting: of a processor, or one more argument of the call that made it."""
        name = ast.unparse(target)
        call = self.names.get(name.partition(".")[0])
        if isinstance(target, ast.Attribute) and target.attr in OF_PROCESSOR and not name.startswith("self."):
            self.script.calls.append(Call(target.attr, {target.attr: setting}, target.lineno))
            return True
        if is_argument := isinstance(target, ast.Attribute) and isinstance(call, Call):
            call.arguments[target.attr] = setting
        return is_argument

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.names = self.names, dict(self.names)
        self.forget(*[part for part in ast.walk(node.args) if isinstance(part, ast.arg)])
        self.generic_visit(node)
        self.names = outer

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.assign(node.target, ast.copy_location(ast.BinOp(node.target, node.op, node.value), node))

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """A name for a value or a call."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its_value in zip(target.elts, value.elts, strict=True):
                self.assign(one, its_value)
            return
        name = ast.unparse(target)
        variable = re.fullmatch(r"os\.environ\[['\"](\w+)['\"]\]", name)
        if variable:
            self.script.environment[variable[1]] = self.setting(value)
        elif self.keep(target, self.setting(value)):
            return
        elif isinstance(target, ast.Subscript) and isinstance(held := self.value(target.value), dict):
            key, whole = self.value(target.slice), ast.unparse(target.value)
            is_key = not isinstance(key, Unknown | list | dict)
            self.names[whole] = held | {key: self.value(value)} if is_key else Unknown(whole)
        else:
            made = [call for call in self.script.calls if isinstance(value, ast.Call) and call.line == value.lineno]
            known = self.value(value)
            self.names[name] = made[-1] if made and isinstance(known, Unknown) else known

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        arguments = {str(place): self.setting(value) for place, value in enumerate(node.args)}
        for keyword in node.keywords:
            spread = self.value(keyword.value) if keyword.arg is None else None
            if keyword.arg:
                arguments[keyword.arg] = self.setting(keyword.value)
            elif not isinstance(spread, dict):
                arguments[f"**{ast.unparse(keyword.value)}"] = self.setting(keyword.value)
            else:
                for key, value in spread.items():
                    text = str(value) if isinstance(value, Unknown) else None
                    arguments[str(key)] = Setting(_plain(value), node.lineno, self.cell, text, _open_keys(value))
        if isinstance(node.func, ast.Attribute) and isinstance(self.value(node.func.value), dict | list):
            self.names.pop(ast.unparse(node.func.value), None)  # `update`, `append`
        self.script.calls.append(Call(ast.unparse(node.func), arguments, node.lineno))

    def setting(self, node: ast.expr) -> Setting:
        written: str | None = ast.unparse(node)
        with suppress(*WRONG):
            written = written if ast.literal_eval(node) is ... else None
        value = self.value(node)
        return Setting(_plain(value), node.lineno, self.cell, written, _open_keys(value))

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; `Unknown` where it, or in a list a part of it, is not known or too long."""
        unknown = Unknown(ast.unparse(node))
        value = self.evaluated(node, unknown)
        return value if _size(value) <= LONGEST_TEXT else unknown

    def evaluated(self, node: ast.expr, unknown: Unknown) -> Any:
        if isinstance(node, ast.Name):
            value = self.names.get(node.id, unknown)
            return self.given(node.id, unknown) if isinstance(value, Call | Unknown) else value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            return dict(zip(keys, [self.value(item) for item in node.values], strict=True))
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
            return self.computed(OPERATORS.get(type(node.op)), [self.value(side) for side in sides], unknown)
        if isinstance(node, ast.JoinedStr):
            whole = [part for part in node.values if isinstance(part, ast.FormattedValue) and not part.format_spec]
            parts = [part.value if part in whole else part for part in node.values]
            return self.computed(lambda *texts: "".join(map(str, texts)), [self.value(part) for part in parts], unknown)
        if isinstance(node, ast.Call):
            return self.called(node, unknown)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, unknown)
        if isinstance(node, ast.IfExp | ast.BoolOp | ast.Compare):
            return self.decided(node, unknown)
        return node.value if isinstance(node, ast.Constant) else unknown

    def decided(self, node: ast.IfExp | ast.BoolOp | ast.Compare, unknown: Unknown) -> Any:
        """The side that a condition takes, or its truth."""
        if isinstance(node, ast.IfExp):
            test = self.value(node.test)
            return unknown if isinstance(test, Unknown) else self.value(node.body if test else node.orelse)
        if isinstance(node, ast.Compare):
            function = OPERATORS.get(type(node.ops[0])) if len(node.ops) == 1 else None
            return self.computed(function, [self.value(side) for side in (node.left, node.comparators[0])], unknown)
        value: Any = unknown
        for side in node.values:
            value = self.value(side)
            if isinstance(value, Unknown) or bool(value) == isinstance(node.op, ast.Or):
                break
        return unknown if isinstance(value, Unknown) else value

    def attribute(self, node: ast.Attribute, unknown: Unknown) -> Any:
        """An argument of the call that made an object; of argparse's, what is given for it, else its default."""
        base = ast.unparse(node.value)
        made, value = self.names.get(base), self.names.get(unknown, unknown)
        is_parsed = base == "args" or (isinstance(made, Call) and PARSED.fullmatch(made.name))
        if isinstance(made, Call) and (setting := made.arguments.get(node.attr)) is not None:
            value = unknown if setting.text == setting.value else setting.value
        elif not is_parsed or (unknown not in self.names and node.attr not in self.script.options):
            return unknown
        elif unknown not in self.names and node.attr not in self.environment:
            return self.script.usual.setdefault(node.attr, self.script.options[node.attr])
        return self.given(node.attr, unknown) if is_parsed and isinstance(value, Call | Unknown) else value

    def given(self, name: str, unknown: Unknown) -> Any:
        text = self.environment.get(name)
        with suppress(*WRONG, SyntaxError):
            return unknown if text is None else ast.literal_eval(text)
        return text

    def called(self, node: ast.Call, unknown: Unknown) -> Any:
        name, given = ast.unparse(node.func), [self.value(argument) for argument in node.args]
        if name == "dict" and not given:
            return {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if name in ("os.environ.get", "os.getenv") and given:
            return self.environment.get(str(given[0]), given[1] if len(given) > 1 else unknown)
        text = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else unknown
        if name.endswith(".replace") and isinstance(text, str) and not isinstance(text, Unknown):
            return self.computed(partial(_replaced, text), given, unknown)
        return self.computed(KINDS.get(name), given, unknown)

    def computed(self, function: Callable[..., Any] | None, given: list[Any], unknown: Unknown) -> Any:
        is_open = _size(given) > LONGEST_TEXT or any(isinstance(part, Unknown) for part in given)
        if function is not None and not is_open:
            with suppress(*WRONG):
                result = function(*given)
                return result if isinstance(result, list) or not any(map(_is_open, given)) else unknown
        return unknown


def _size(value: Any) -> int:
    """Characters that a value takes, about; an integer counts triple, so that a product of two can be written."""
    if isinstance(value, list | dict):
        return len(value) + sum(map(_size, [*value, *(value.values() if isinstance(value, dict) else ())]))
    return len(value) if isinstance(value, str | bytes) else value.bit_length() * 10 if isinstance(value, int) else 1


def _remainder(left: Any, right: Any) -> Any:
    """`left % right`; ValueError or the like for a text that would be too long, and for bytes."""
    if isinstance(left, bytes):
        raise ValueError
    if isinstance(left, str):
        widths = sum(int(width) for width in re.findall(r"\d+", left))
        if "*" in left or widths + left.count("%") * _size(right) > LONGEST_TEXT:
            raise ValueError
    return left % right


def _is_open(value: Any) -> bool:
    """True if a value, or a part of it, is not known."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Unknown) or any(map(_is_open, parts))


def _open_keys(value: Any) -> frozenset[str]:
    return (
        frozenset(str(key) for key, item in value.items() if _is_open(item)) if isinstance(value, dict) else frozenset()
    )


def _replaced(text: str, old: str, new: str, *count: int) -> str:
    if len(text) + text.count(old) * len(new) > LONGEST_TEXT:
        raise ValueError
    return text.replace(old, new, *count)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    plain = str(value) if isinstance(value, str) else value
    return [_plain(item) for item in value] if isinstance(value, list) else plain
