"""The rows that a model will see, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.data import DataView, ShownRow
from grpo_autotune.render.text import as_text, section
from grpo_autotune.units import amount, listing, plural

MOST, MOST_OF_VALUE = 800, 200
"""Characters that are shown of a text, and of a column's value."""


def render_data(view: DataView, width: int, *, full: bool) -> str:
    """The view as text of `width` columns; long texts are cut unless it is to be `full`."""
    return as_text(_parts(view, full=full), width, colour=False)


def _parts(view: DataView, *, full: bool) -> Iterator[RenderableType]:
    sets = [f"{plural(view.rows, 'row')} to train on"]
    sets += [f"{count} held out{f' as {name}' if name else ''}" for name, count in view.held_out.items()]
    yield Text(f"{view.source}: {listing(sets)}")
    yield Text(f"Columns: {', '.join(view.columns)}")
    t = view.prompt_tokens
    numbers = f"{t.least} to {t.most}, median {amount(t.median)}, 95% have at most {amount(t.p95)}"
    yield Text(f"Prompt tokens, images included: {numbers} ({plural(t.rows, 'row')} looked at)")
    for row in view.shown:
        yield from section(f"Row {row.row}, {plural(row.tokens, 'token')}", list(_row(row, full=full)))
    yield Text("\nThe reference answers as completions", style="bold")
    table = Table("reward", "reads", "scored", "rows", "mean", "least", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in view.rewards:
        figures = ["" if value is None else amount(value) for value in (one.mean, one.least)]
        scored = one.reference or "nothing"
        table.add_row(one.name, ", ".join(one.reads) or "the completion alone", scored, str(one.rows), *figures)
    yield Padding(table, (0, 0, 0, 2))
    yield from (Padding(Text(f"{one.name}: {one.note}"), (0, 0, 0, 2)) for one in view.rewards if one.note)


def _row(row: ShownRow, *, full: bool) -> Iterator[str]:
    yield from (f"| {line}" for line in _cut(row.text, MOST, full=full).split("\n"))
    for image in row.images:
        yield f"image: {image.width} x {image.height}" + ("" if image.tokens is None else f", {image.tokens} tokens")
    for name, value in row.columns.items():
        yield f"{name}: {_cut(value, MOST_OF_VALUE, full=full)}"
    scores = (f"{name} {'none' if score is None else amount(score)}" for name, score in row.scores.items())
    yield f"scores of the reference: {', '.join(scores) or 'none'}"


def _cut(text: str, most: int, *, full: bool) -> str:
    half = most // 2
    if full or len(text) <= most:
        return text
    return f"{text[:half]} ... ({len(text) - 2 * half} characters; --full) ... {text[-half:]}"
