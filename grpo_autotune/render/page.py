"""A page of HTML from its parts: one file without scripts or network, every datum cleaned and escaped in one place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import vl_convert
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.table import Table as RichTable

MOST_CHARACTERS = 4000
"""Characters of one datum that a page shows."""

HOME = os.path.expanduser("~")  # noqa: PTH111 - a user without a home is no error here
REDACTED = (
    (r"(\w+://)[^/\s@]+@", r"\1"),
    (r"(?i)((?:token|key|secret|password)=|bearer )[^\s&'\"]{6,}", r"\1(a key)"),
    (r"(?<![\w-])(?:hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}", "(a key)"),
    (rf"(?<![\w.]){re.escape(HOME.rstrip('/') or '~')}(?![\w.-])", "~"),
    (r"(?<![\w.])(?:/home/[^/\s'\"]+|/Users/[^/\s'\"]+|/root|[A-Za-z]:\\Users\\[^\\\s'\"]+)(?![\w.-])", "~"),
)
"""Keys by their known beginnings, names and passwords in addresses, home folders -> what stands in their place."""
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """Rows of cells below their columns' titles; the first cell names its row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    anchor: str = ""  # rows get the id `anchor-FIRST_CELL` where it is set
    caption: str = ""

    def is_text(self, column: int) -> bool:
        """True for a column of words, which begin at one edge, where numbers with their units end at one."""
        return any((text := str(row[column] or "")) and not re.fullmatch(r"(?=.*\d).{,24}", text) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A Vega-Lite specification, the same in words, and the table of its numbers."""

    title: str
    alt: str
    spec: dict[str, Any]
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """Sentences, a paragraph each, or points of a numbered list."""

    lines: Sequence[str]
    numbered: bool = False
    title: str = ""
    strong: bool = False  # a warning, or the sentence that matters most


@dataclass(frozen=True)
class Diff:
    """Lines of a unified diff."""

    lines: Sequence[str]


Block = Table | Picture | Lines | Diff


class Section(NamedTuple):
    """A part of a page; left out where it has no blocks, and so are blocks of no lines."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def from_rich(table: RichTable, *, anchor: str = "", caption: str = "") -> Table:
    """The table of a terminal; a column of bars is left out."""
    shown = [column for column in table.columns if column.header or not any("█" in str(c) for c in column.cells)]
    cells = [[str(cell) for cell in column.cells] for column in shown]
    return Table([str(column.header) for column in shown], list(zip(*cells, strict=True)), anchor, caption)


def datum(value: Any) -> Any:
    """A datum as text that is safe to show: in one line, without keys, home folders and signs not printable."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} ... ({len(text)} characters)"
    for pattern, instead in REDACTED:
        text = re.sub(pattern, instead, text)
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else repr(c)[1:-1] for c in text)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=datum, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters["slug"] = lambda text: re.sub(r"\W+", "-", datum(text)).strip("-")[:60]
ENVIRONMENT.filters["svg"] = lambda spec: Markup(vl_convert.vegalite_to_svg({**spec, "params": []}))  # escapes texts
ENVIRONMENT.filters["kind"] = lambda block: type(block).__name__


def render_page(
    title: str, sections: Sequence[Section], *, interactive: bool = False, refresh_s: int | None = None
) -> str:
    """The page as one text; `interactive` pictures have tooltips and zoom, drawn by Vega in the browser, which makes it
    0.9 MB larger. A browser reads the page again after `refresh_s`; None for a run that is over."""
    shown = [(s, blocks) for s in sections if (blocks := [b for b in s.blocks if not isinstance(b, Lines) or b.lines])]
    pictures = [block for _, blocks in shown for block in blocks if isinstance(block, Picture)]
    specs = json.dumps([picture.spec for picture in pictures]) if interactive else ""
    # Vega with an interpreter of expressions, which a page may run that forbids `eval`, and the call that draws
    script = str(vl_convert.javascript_bundle((TEMPLATES / "draw.js").read_text("utf-8"))) if interactive else ""
    script = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ENVIRONMENT.get_template("page.html").render(
        title=title, sections=shown, number=pictures.index, refresh_s=refresh_s,
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")), script=Markup(script),
        specs=Markup(specs.replace("<", "\\u003c")),  # in a script element nothing is escaped but what could end it
        script_source=Markup(f"; script-src 'sha256-{digest}'" if interactive else ""),
    )  # fmt: skip


def render_cell(title: str, sections: Sequence[Section]) -> str:
    """The body of the page for a notebook's cell: its style holds there alone, and its ids are met nowhere else."""
    prefix = f"r{os.urandom(4).hex()}-"
    body = render_page(title, sections).partition("<main>")[2].partition("</main>")[0]
    ids = re.compile(r'( id="|href="#|labelledby="|"url\(#)')
    body = re.sub("<[^>]+>", lambda tag: ids.sub(rf"\g<1>{prefix}", tag[0]), body)
    style = re.sub(r":root|\bbody\b", "&", (TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return f'<div class="grpo-autotune"><style>.grpo-autotune {{ {style} }}</style>{body}</div>'
