"""The README's tree of the package: one line a file, each the first sentence of the file's own docstring.

`python -m tests.readme_tree` writes it; a test holds the README against it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tree: python -m tests.readme_tree -->\n", "<!-- end of tree -->\n"
WIDTH = 24


def first_sentence(path: Path) -> str:
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(told.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`])\. ", paragraph)[0].rstrip(".")


def tree() -> str:
    """The block between the marks, marks excluded."""
    package = ROOT / "grpo_autotune"
    lines = ["```", "grpo_autotune/"]
    lines += [entry(path, 1) for path in sorted(package.glob("*.py")) if path.stem != "__init__"]
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        lines.append(line(f"{folder.name}/", 1, first_sentence(folder / "__init__.py")))
        lines += [entry(path, 2) for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return "\n".join([*lines, "```", ""])


def entry(path: Path, depth: int) -> str:
    return line(path.name, depth, first_sentence(path))


def line(name: str, depth: int, told: str) -> str:
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
