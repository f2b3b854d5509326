"""A key of a YAML or JSON text given another value, all other characters left as they are."""

import re
from collections.abc import Iterator

import yaml

MARK = re.compile(r"\s*:\s+(?:(?P<alias>\*[^\s,\]}]+)|&\S+\s+)")


def yaml_edits(text: str, key: str, value: str) -> Iterator[str]:
    """The text with the key set, its names joined by dots or nested: the value replaced, else the key put in front of
    the others of the innermost mapping that there is."""
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
