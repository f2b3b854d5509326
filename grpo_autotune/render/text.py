"""Text of anything that rich can draw, without trailing blanks and with single empty lines."""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text


def as_text(parts: Iterable[RenderableType], width: int, *, colour: bool) -> str:
    """The parts one below the other, as text of `width` columns, with ANSI escapes where `colour` is asked for."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        no_color=not colour,
        force_jupyter=False,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as captured:
        console.print(Group(*parts))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    kept = [line for before, line in zip(["", *lines], lines, strict=False) if line or before]
    return "\n".join(kept).rstrip() + "\n"


def table_of(*titles: str, right: Collection[str] = ()) -> Table:
    """An empty table without lines between its rows; the columns named in `right` end at that edge."""
    columns = (Column(title, justify="right" if title in right else "left") for title in titles)
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def sections(notes: Mapping[str, list[str]]) -> list[RenderableType]:
    """A section for each title with its lines."""
    return [part for title, lines in notes.items() for part in section(title, lines)]


def section(title: str, lines: list[str]) -> Iterator[RenderableType]:
    """A title and indented lines below it; nothing without lines."""
    if lines:
        yield Text(f"\n{title}", style="bold")
        for line in lines:
            yield Padding(Text(line), (0, 0, 0, 2))
