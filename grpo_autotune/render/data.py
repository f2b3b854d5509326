"""The rows that a model will see, for a terminal."""

import math
import statistics
from collections.abc import Iterator

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from grpo_autotune.records.data import DataView, ShownRow
from grpo_autotune.render.text import as_text, section, table_of
from grpo_autotune.units import amount, listing, plural

MOST, MOST_OF_VALUE = 800, 200
"""Characters that are shown of a text, and of a column's value."""


def render_data(view: DataView, width: int, *, full: bool) -> str:
    """The view as text of `width` columns; long texts are cut unless it is to be `full`."""
    return as_text(_parts(view, full=full), width, colour=False)


def _parts(view: DataView, *, full: bool) -> Iterator[RenderableType]:
    sets = [f"{count} held out{f' as {name}' if name else ''}" for name, count in view.held_out.items()]
    yield Text(f"{view.source}: {listing([plural(view.rows, 'row') + ' to train on', *sets])}")
    yield Text(f"Columns: {', '.join(view.columns)}")
    tokens = sorted(view.prompt_tokens.values())
    p95 = tokens[math.ceil(0.95 * len(tokens)) - 1]
    numbers = f"{tokens[0]} to {tokens[-1]}, median {amount(statistics.median(tokens))}, 95% have at most {p95}"
    yield Text(f"Prompt tokens, images included: {numbers} ({plural(len(tokens), 'row')} looked at)")
    for row in view.shown:
        title = f"Row {row.row}, {plural(view.prompt_tokens[row.row], 'token')}"
        yield from section(title, [*_row(row, full=full), f"scores of the reference: {_scores(view, row.row)}"])
    yield Text("\nThe reference answers as completions", style="bold")
    table = table_of("reward", "reads", "scored", "rows", "mean", "least")
    for one in view.rewards:
        scores = [score for score in one.scores.values() if score is not None]
        figures = [amount(statistics.fmean(scores)), amount(min(scores))] if scores else []
        reads = ", ".join(one.reads) or "the completion alone"
        table.add_row(one.name, reads, one.reference or "nothing", str(len(scores)), *figures)
    yield Padding(table, (0, 0, 0, 2))
    yield from (Padding(Text(f"{one.name}: {one.note}"), (0, 0, 0, 2)) for one in view.rewards if one.note)


def _row(row: ShownRow, *, full: bool) -> Iterator[str]:
    yield from (f"| {line}" for line in _cut(row.text, MOST, full=full).split("\n"))
    for image in row.images:
        yield f"image: {image.width} x {image.height}" + ("" if image.tokens is None else f", {image.tokens} tokens")
    yield from (f"{name}: {_cut(value, MOST_OF_VALUE, full=full)}" for name, value in row.columns.items())


def _scores(view: DataView, row: int) -> str:
    scores = {one.name: one.scores[row] for one in view.rewards if row in one.scores}
    return ", ".join(f"{name} {'none' if score is None else amount(score)}" for name, score in scores.items()) or "none"


def _cut(text: str, most: int, *, full: bool) -> str:
    half = most // 2
    if full or len(text) <= most:
        return text
    return f"{text[:half]} ... ({len(text) - 2 * half} characters; --full) ... {text[-half:]}"
