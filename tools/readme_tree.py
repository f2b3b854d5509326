"""The README's tree of the package: one line a file, each the first sentence of the file's own docstring.

`python -m tools.readme_tree` writes it; a test holds the README against it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tree: python -m tools.readme_tree -->\n", "<!-- end of tree -->\n"
WIDTH = 24


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(told.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`])\. ", paragraph)[0].rstrip(".")


def tree() -> str:
    """The block between the marks, marks excluded."""
    package = ROOT / "grpo_autotune"
    return "\n".join(["```", "grpo_autotune/", *_inside(package, 1), "```", ""])


def _inside(folder: Path, depth: int) -> Iterator[str]:
    """A folder's modules, then its rooms, each followed by what is inside."""
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            yield _line(path.name, depth, first_sentence(path))
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield _line(f"{inner.name}/", depth, first_sentence(inner / "__init__.py"))
        yield from _inside(inner, depth + 1)


def _line(name: str, depth: int, told: str) -> str:
    return f"{'  ' * depth + name:<{WIDTH}} {told}"


def with_tree(readme: str) -> str:
    """The README's text with the tree brought up to date.

    Raises:
        ValueError: The marks are not there.
    """
    before, rest = readme.split(BEGIN)
    return before + BEGIN + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_tree(page.read_text()))
