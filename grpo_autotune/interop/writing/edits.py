"""A key of a file given another value: every way to do it, by the file's kind, the closest to the user's text first.

A value is replaced where it stands: in YAML in its place, in a shell script in the argument, array item, variable or
default (`${V:-x}`), in Python in the call or behind the name in it. Else the key is added.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tree_sitter_bash
import yaml
from tree_sitter import Language, Node, Parser

from grpo_autotune.interop.reading.shell import within

MARK = re.compile(r"\s*:\s+(?:(?P<alias>\*[^\s,\]}]+)|&\S+\s+)")


def yaml_edits(text: str, key: str, value: str) -> Iterator[str]:
    """The text with the key set, its names joined by dots or nested, or in front of others in the innermost mapping."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    names = key.lstrip("+").split(".")
    while isinstance(node, yaml.MappingNode) and node.value:
        inner = {name.value: (name, content) for name, content in node.value}
        joined = next((count for count in range(len(names), 0, -1) if ".".join(names[:count]) in inner), 0)
        if joined == 0:
            yield _added(text, node, names, value)
            return
        (name, child), names = inner[".".join(names[:joined])], names[joined:]
        if not names:
            start, end = child.start_mark.index, child.end_mark.index
            mark = MARK.match(text, name.end_mark.index)
            if mark is not None:  # an alias stands for a value elsewhere; an anchor stays
                start, end = mark.span("alias") if mark["alias"] else (mark.end(), end)
            while end > start and text[end - 1].isspace():
                end -= 1  # a block ends where the next key begins
            yield text[:start] + value + text[end:]
            return
        node = child


def _added(text: str, mapping: yaml.MappingNode, names: list[str], value: str) -> str:
    first = mapping.value[0][0].start_mark
    if mapping.flow_style:
        nested = "".join(f'"{name}": {{' for name in names[:-1]) + f'"{names[-1]}": {value}' + "}" * (len(names) - 1)
        return f"{text[: first.index]}{nested}, {text[first.index :]}"
    indents = [" " * (first.column + 2 * depth) for depth in range(len(names))]
    lines = [f"{indent}{name}:" for indent, name in zip(indents, names, strict=True)]
    return f"{text[: first.index]}{f'{chr(10)}'.join(lines).lstrip()} {value}\n{indents[0]}{text[first.index :]}"


OVERRIDE, OPTION = "{key}={value}", "--{key} {value}"  # of Hydra and OmegaConf; of HfArgumentParser
ARGUMENTS = ("word", "string", "raw_string", "concatenation", "number", "simple_expansion", "expansion")
DEEPEST = 8


def replaced(data: bytes, span: tuple[int, int], words: str) -> str:
    """UTF-8 text with the bytes of a span replaced."""
    return (data[: span[0]] + words.encode() + data[span[1] :]).decode()


def shell_edits(text: str, key: str, value: str, form: str) -> Iterator[str]:
    """Texts of the script with the key set, one edit each."""
    data = text.encode()
    root = Parser(Language(tree_sitter_bash.language())).parse(data).root_node
    assigned: dict[str, list[Node]] = {}  # variable -> nodes of the values it is given, the last one first
    for node in within(root):
        target, given = (node.child_by_field_name(field) for field in ("name", "value"))
        if node.type == "variable_assignment" and target is not None and given is not None:
            assigned.setdefault((target.text or b"").decode(), []).insert(0, given)
    name = re.escape(key.lstrip("+")).replace("_", "[_-]") if form == OPTION else re.escape(key.lstrip("+"))
    for holder in reversed([node for node in within(root) if node.type in ("array", "command")]):
        items = [node for node in holder.named_children if node.type in ARGUMENTS]
        for place, item in enumerate(items):
            for span in _values(data, items, place, item, name):
                yield from _replacing(data, span, value, assigned)
    for command in sorted((node for node in within(root) if node.type == "command"), key=lambda node: -node.end_byte):
        yield _appended(data, command, form.format(key=key, value=value))


def _values(data: bytes, items: list[Node], place: int, item: Node, name: str) -> Iterator[tuple[int, int]]:
    words = data[item.start_byte : item.end_byte].decode()
    inside = re.fullmatch(rf"(?s)([\"']?)(?:\+{{0,2}}|--){name}=([\"']?)(?P<value>.*)\2\1", words)
    if inside is not None:
        start = item.start_byte + len(words[: inside.start("value")].encode())
        yield start, start + len(inside["value"].encode())
    elif re.fullmatch(rf"--?{name}", words) and place + 1 < len(items):
        yield _bare(data, items[place + 1])


def _bare(data: bytes, node: Node) -> tuple[int, int]:
    quoted = data[node.start_byte : node.start_byte + 1] in (b'"', b"'")
    return node.start_byte + quoted, node.end_byte - quoted


def _replacing(
    data: bytes, span: tuple[int, int], value: str, assigned: dict[str, list[Node]], depth: int = 0
) -> Iterator[str]:
    """The value put in place of a span; where a variable stands there, in place of its default and of what it is."""
    words = data[slice(*span)].decode()
    variable = re.fullmatch(r"\$\{?(?P<name>\w+)(:?-(?P<default>.*))?\}?", words, re.DOTALL)
    if variable is None:
        yield replaced(data, span, value)
        return
    if variable["default"] is not None:
        start = span[0] + len(words[: variable.start("default")].encode())
        inner = start, start + len(variable["default"].removesuffix("}").encode())
        yield from _replacing(data, inner, value, assigned, depth + 1)
    for node in assigned.get(variable["name"], []) if depth < DEEPEST else ():
        yield from _replacing(data, _bare(data, node), value, assigned, depth + 1)


def _appended(data: bytes, command: Node, words: str) -> str:
    last = command.named_children[-1]
    if last.text in (b'"$@"', b"$@", b'"${@}"'):
        return replaced(data, (last.start_byte, last.start_byte), f"{words} ")
    lines = " \\\n    " if command.end_point.row > command.start_point.row else " "
    return replaced(data, (last.end_byte, last.end_byte), f"{lines}{words}")


CONFIG = re.compile(r"\w*(Config|Arguments)")  # calls that a missing argument may be added to


def python_edits(text: str, key: str, value: str) -> Iterator[str]:
    """Texts of the script with the argument set, the literal in the call or behind the name in it, else added."""
    data, lines = text.encode(), [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return

    def span(node: ast.expr) -> tuple[int, int]:
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return lines[node.lineno - 1] + node.col_offset, lines[end_line - 1] + end_column

    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for given in [word.value for call in calls for word in call.keywords if word.arg == key]:
        if isinstance(given, ast.Name):
            for node in nodes:
                if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [given.id]:
                    yield replaced(data, span(node.value), value)
        yield replaced(data, span(given), value)
    for call in calls:
        if call.keywords and CONFIG.fullmatch(ast.unparse(call.func).rpartition(".")[2]):
            first = call.keywords[0]
            start = lines[first.lineno - 1] + first.col_offset
            pad = f"\n{' ' * first.col_offset}" if first.lineno > call.lineno else " "
            yield replaced(data, (start, start), f"{key}={value},{pad}")


HYDRA = ("verl", "easyr1")


def edits(path: Path, text: str, key: str, value: Any, framework: str) -> Iterator[str]:
    """Texts of the file with the key set."""
    plain = value if isinstance(value, str) else json.dumps(value)
    kind, name = path.suffix.lower(), key.rpartition(".")[2]
    if kind in (".yaml", ".yml"):
        return yaml_edits(text, key, plain)
    if kind == ".json":
        return yaml_edits(text, key, json.dumps(value))
    if kind in (".py", ".ipynb"):
        return python_edits(text, name, repr(value))
    if framework not in HYDRA:
        return shell_edits(text, key, shlex.quote(plain), OPTION)
    return shell_edits(text, key, str(value) if isinstance(value, bool) else shlex.quote(plain), OVERRIDE)
