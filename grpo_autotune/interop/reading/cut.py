"""Commands of a script that a comment, or a space behind a backslash, cuts before their end."""

import re
from collections.abc import Iterator

from tree_sitter import Node

ARGUMENT = re.compile(r"\s*(-{1,2}[A-Za-z][\w-]*|[+~]{0,2}[\w./@-]+(?==)|\"?\$[\w{@])")


def within(node: Node) -> Iterator[Node]:
    """A node and all below it."""
    yield node
    for child in node.children:
        yield from within(child)


def cut_commands(text: str, tree: Node) -> list[str]:
    """Warnings of commands that a comment, or a space behind a backslash, cuts before their end."""
    lines, warnings = text.splitlines(), []
    source = text.encode()
    comments = {source.count(b"\n", 0, node.start_byte) for node in within(tree) if node.type == "comment"}
    for number in range(len(lines)):
        after_more = number > 0 and lines[number - 1].endswith("\\") and number - 1 not in comments
        alone = number in comments and lines[number].lstrip().startswith("#")
        comment = alone and after_more
        if not comment and (alone or not re.search(r"(^|[^\\])\\[ \t]+(#.*)?$", lines[number])):
            continue
        start = next((n for n in range(number + 1, len(lines)) if n not in comments), len(lines))
        end = next((n for n in range(start, len(lines)) if not lines[n].endswith("\\")), len(lines) - 1)
        if names := [match[1] for lost in lines[start : end + 1] if (match := ARGUMENT.match(lost))]:
            what = "a comment" if comment else "a space behind the backslash"
            lost = f"lines {start + 1} to {end + 1} are not passed to it ({', '.join(names)})"
            warnings.append(f"line {number + 1}: {what} ends the command here; {lost}")
    return warnings
