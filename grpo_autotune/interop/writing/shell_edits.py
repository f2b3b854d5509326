"""A key of a shell script given another value: every way to do it, the one closest to the user's own text first.

The value is replaced where it stands: in the argument or array item, in the assignment of the variable that the
argument names, or in a default (`${V:-x}`). Else the key is appended to a command, where the last one of a key wins.
Whether an edit does what it should is for the reader of such scripts to say.
"""

import re
from collections.abc import Iterator

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

OVERRIDE, OPTION = "{key}={value}", "--{key} {value}"
"""How a program takes a key: Hydra and OmegaConf; HfArgumentParser."""
ARGUMENTS = ("word", "string", "raw_string", "concatenation", "number", "simple_expansion", "expansion")
DEEPEST = 8


def replaced(data: bytes, span: tuple[int, int], words: str) -> str:
    """UTF-8 text with the bytes of a span replaced."""
    return (data[: span[0]] + words.encode() + data[span[1] :]).decode()


def shell_edits(text: str, key: str, value: str, form: str) -> Iterator[str]:
    """Texts of the script with the key set, one edit each."""
    data = text.encode()
    root = Parser(Language(tree_sitter_bash.language())).parse(data).root_node
    assigned = _assignments(root)
    name = re.escape(key.lstrip("+")).replace("_", "[_-]") if form == OPTION else re.escape(key.lstrip("+"))
    for holder in reversed([node for node in _walk(root) if node.type in ("array", "command")]):
        items = [node for node in holder.named_children if node.type in ARGUMENTS]
        for place, item in enumerate(items):
            for span in _values(data, items, place, item, name):
                yield from _replacing(data, span, value, assigned)
    for command in sorted((node for node in _walk(root) if node.type == "command"), key=lambda node: -node.end_byte):
        yield _appended(data, command, form.format(key=key, value=value))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.named_children:
        yield from _walk(child)


def _assignments(root: Node) -> dict[str, list[Node]]:
    values: dict[str, list[Node]] = {}
    for node in _walk(root):
        target, value = (node.child_by_field_name(field) for field in ("name", "value"))
        if node.type == "variable_assignment" and target is not None and value is not None:
            values.setdefault((target.text or b"").decode(), []).insert(0, value)
    return values


def _values(data: bytes, items: list[Node], place: int, item: Node, name: str) -> Iterator[tuple[int, int]]:
    """Byte spans of the values that an argument gives a key, quotes left out."""
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
    """The words at a command's end, in front of `"$@"`; on a line of their own where the command has several."""
    last = command.named_children[-1]
    if last.text in (b'"$@"', b"$@", b'"${@}"'):
        return replaced(data, (last.start_byte, last.start_byte), f"{words} ")
    lines = " \\\n    " if command.end_point.row > command.start_point.row else " "
    return replaced(data, (last.end_byte, last.end_byte), f"{lines}{words}")
