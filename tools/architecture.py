"""The package as tables and a picture, read from its source: rooms, files, seams, and who imports whom.

`make docs` puts them into the pages (`tools.pages`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from grpo_autotune.seams.table import GRPO_MODULE, TABLE
from tools.layered import draw

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_autotune"
FILE_WIDTH, ROOM_WIDTH = 24, 13


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a module, parsed once."""
    return ast.parse(path.read_text())


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(tree(path)) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`])\. ", paragraph)[0].rstrip(".")


def file_tree() -> str:
    """A line for each folder and file of the package."""
    return "\n".join(["```", "grpo_autotune/", *_inside(PACKAGE, 1), "```", ""])


def _inside(folder: Path, depth: int) -> Iterator[str]:
    """The modules of a folder, then its rooms, each followed by what is inside."""
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            yield _line(path.name, depth, first_sentence(path))
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield _line(f"{inner.name}/", depth, first_sentence(inner / "__init__.py"))
        yield from _inside(inner, depth + 1)


def _line(name: str, depth: int, sentence: str) -> str:
    return f"{'  ' * depth + name:<{FILE_WIDTH}} {sentence}"


def room_map() -> str:
    """A line for each room, those that import most of the others first."""
    top_down = [room for floor in reversed(floors(room_imports())) for room in floor]
    folders = [room for room in top_down if (PACKAGE / room).is_dir()]
    lines = [f"{room + '/':<{ROOM_WIDTH}} {first_sentence(PACKAGE / room / '__init__.py')}" for room in folders]
    return "\n".join(["```", *lines, "```", ""])


def seam_table() -> str:
    """The seams of TRL, transformers and accelerate as a table, in the order of `seams/table.py`."""
    rows = [
        f"| `{row.key}` | {f'`{row.stage}`' if row.stage else '(container)'} | {row.part or ''} "
        f"| `{row.owner.removeprefix(GRPO_MODULE + '.') if row.owner != GRPO_MODULE else 'module'}.{row.attribute}` |"
        for row in TABLE
    ]
    return "\n".join(["| seam | stage | part | function |", "|---|---|---|---|", *rows, ""])


def room_imports() -> dict[str, set[str]]:
    """Each room of the package (a folder, or a module at its top) with the rooms that its modules import."""
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    rooms -= {"__init__", "__main__"}
    reached: dict[str, set[str]] = {room: set() for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in rooms:
            reached[room] |= {name for name in _imported_rooms(path) if name in rooms and name != room}
    return reached


def _imported_rooms(path: Path) -> Iterator[str]:
    """First names below the package of everything that a module imports; the package has no relative imports."""
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name and rest:
                yield rest.partition(".")[0]


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the ground first: a room stands one floor above the highest room that it imports.

    Raises:
        ValueError: Rooms import each other.
    """
    standing: dict[str, int] = {}
    while len(standing) < len(imports):
        ready = [room for room in imports if room not in standing and imports[room] <= set(standing)]
        if not ready:
            raise ValueError(f"these rooms import each other: {sorted(set(imports) - set(standing))}")
        standing |= {room: max((standing[other] + 1 for other in imports[room]), default=0) for room in ready}
    return [
        sorted(room for room in imports if standing[room] == number) for number in range(max(standing.values()) + 1)
    ]


def needed_arrows(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Pairs (importer, imported) without those that follow from others (the transitive reduction)."""
    below: dict[str, set[str]] = {}
    for floor in floors(imports):
        for room in floor:
            below[room] = imports[room].union(*(below[other] for other in imports[room]))
    return {
        (room, other)
        for room, others in imports.items()
        for other in others
        if not any(other in below[between] for between in others)
    }


def picture() -> str:
    """The rooms and the arrows between them as SVG."""
    imports = room_imports()
    sources = {room: PACKAGE / room / "__init__.py" for room in imports}
    sentences = {
        room: first_sentence(path if path.is_file() else PACKAGE / f"{room}.py") for room, path in sources.items()
    }
    return draw(floors(imports), needed_arrows(imports), sentences)
