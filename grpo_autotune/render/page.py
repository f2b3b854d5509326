"""A page of HTML from its parts: one file without scripts or network, every datum cleaned and escaped in one place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.table import Table as RichTable

MOST_CHARACTERS = 4000
"""Characters of one datum that a page shows."""
LONGEST_NUMBER = 24
"""Characters of a number with its interval and unit."""
MOST_ROWS = 1000
"""Rows of a table that a page shows."""

REDACTED = (
    (re.compile(r"(?<![\w-])(?:hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}"), "(a key)"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1"),
    (
        re.compile(r"(?<![\w.])(?:/home/[^/\s'\"]+|/Users/[^/\s'\"]+|/root|[A-Za-z]:\\Users\\[^\\\s'\"]+)(?![\w.-])"),
        "~",
    ),
)
"""Keys by their known beginnings, names and passwords in addresses, home folders -> what stands in their place."""
SECRET_KEY = re.compile(r"(?i)(?:^|[._])(?:\w*(?:token|api_?key|secret|password|credential)s?)$")
"""Key paths whose text is never shown."""


@dataclass(frozen=True)
class Table:
    """Rows of cells below their columns' titles; the first cell names its row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    anchor: str = ""  # rows get the id `anchor-FIRST_CELL` where it is set
    caption: str = ""

    kind: ClassVar = "table"

    def is_text(self, column: int) -> bool:
        """True for a column of words, which begin at one edge, where numbers end at one."""
        cells = [str(row[column]) for row in self.rows[:MOST_ROWS] if row[column] not in (None, "")]
        return any(len(cell) > LONGEST_NUMBER or not any(sign.isdigit() for sign in cell) for cell in cells)


@dataclass(frozen=True)
class Picture:
    """A Vega-Lite specification, the same in words, and the table of its numbers."""

    title: str
    alt: str
    spec: dict[str, Any]
    table: Table
    note: str = ""

    kind: ClassVar = "picture"


@dataclass(frozen=True)
class Lines:
    """Sentences, a paragraph each, or points of a numbered list."""

    lines: Sequence[str]
    numbered: bool = False
    title: str = ""
    strong: bool = False  # a warning, or the sentence that matters most

    kind: ClassVar = "lines"


@dataclass(frozen=True)
class Diff:
    """Lines of a unified diff."""

    lines: Sequence[str]

    kind: ClassVar = "diff"


Block = Table | Picture | Lines | Diff


class Section(NamedTuple):
    """A part of a page; left out where it has no blocks."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def from_rich(table: RichTable, *, anchor: str = "") -> Table:
    """The table of a terminal; a column of bars is left out."""
    shown = [column for column in table.columns if column.header or not any("█" in str(c) for c in column.cells)]
    cells = [[str(cell) for cell in column.cells] for column in shown]
    return Table([str(column.header) for column in shown], list(zip(*cells, strict=True)), anchor)


def datum(value: Any) -> Any:
    """A datum as text that is safe to show: in one line, without keys, home folders and signs not printable."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} ... ({len(text)} characters)"
    for pattern, instead in REDACTED:
        text = pattern.sub(instead, text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else repr(c)[1:-1] for c in text)


def render_page(
    title: str, sections: Sequence[Section], *, interactive: bool = False, refresh_s: int | None = None
) -> str:
    """The page as one text.

    Args:
        title: Of the page and its first heading.
        sections: In their order.
        interactive: Pictures with tooltips and zoom, drawn by Vega in the browser; about 0.9 MB more.
        refresh_s: Seconds after which a browser reads the page again; None for a run that is over.
    """
    shown = [section for section in sections if section.blocks]
    pictures = [block for section in shown for block in section.blocks if isinstance(block, Picture)]
    specs = json.dumps([_zoomable(picture.spec) for picture in pictures]) if interactive else ""
    script = _script() if interactive else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            sections=shown,
            number=pictures.index,
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            refresh_s=refresh_s,
            # in a script element nothing is escaped but what could end it
            specs=Markup(specs.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")),
            script=Markup(script),
            script_source=Markup(f"; script-src 'sha256-{digest}'" if interactive else ""),
            most_rows=MOST_ROWS,
        )
    )
    return page


def render_cell(title: str, sections: Sequence[Section]) -> str:
    """The body of the page for a notebook's cell: its style holds there alone, and its ids are met nowhere else."""
    prefix = f"r{os.urandom(4).hex()}-"
    body = render_page(title, sections).partition("<main>")[2].partition("</main>")[0]
    body = re.sub(
        r'( id="|href="#|labelledby="|"url\(#)', rf"\g<1>{prefix}", body
    )  # no datum has a quote that is not escaped
    style = re.sub(r":root|\bbody\b", "&", (TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return f'<div class="grpo-autotune"><style>.grpo-autotune {{ {style} }}</style>{body}</div>'


def _zoomable(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with a wheel that zooms along a continuous x axis, where it has one."""
    x = spec.get("encoding", {}).get("x", {})
    if x.get("type") != "quantitative" or "bin" in x:
        return spec
    return {**spec, "params": [{"name": "zoom", "select": {"type": "interval", "encodings": ["x"]}, "bind": "scales"}]}


TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=datum, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"svg": _svg, "slug": lambda text: re.sub(r"\W+", "-", datum(text)).strip("-")[:60]}
    return environment


def _svg(spec: dict[str, Any]) -> Markup:
    """The picture; Vega escapes the texts in it, and its ids could only meet those of another picture."""
    import vl_convert

    return Markup(vl_convert.vegalite_to_svg(spec))


def _script() -> str:
    """Vega with an interpreter of expressions, which a page may run that forbids `eval`, and the call that draws."""
    import vl_convert

    draw = (TEMPLATES / "draw.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(draw).replace("</script", "<\\/script").replace("<!--", "<\\!--")
