"""The ranked checkpoints of a run as text for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.evaluation_lines import COLUMNS
from grpo_autotune.records.evaluations import CheckpointList, SavedRow
from grpo_autotune.render.text import as_text
from grpo_autotune.units import plural, size

MOST_ROWS = 10
"""Checkpoints that are listed without `--show-all`."""
MEASURED = ("held-out reward", "val loss", "KL")
RANKED_BY = {"held-out reward": "eval_reward", "val loss": "eval_loss", "KL": "eval_kl"}


def render_checkpoints(listed: CheckpointList, *, show_all: bool = False, width: int | None = None) -> str:
    """The list, the best at the top, and why it is the best."""
    return as_text(_parts(listed, show_all), width or shutil.get_terminal_size((100, 24)).columns, colour=False)


def _parts(listed: CheckpointList, show_all: bool) -> Iterator[RenderableType]:
    shown = listed.rows if show_all else listed.rows[:MOST_ROWS]
    measured = [title for title in MEASURED if RANKED_BY[title] != listed.metric or title == "held-out reward"]
    measured = [title for title in measured if any(_cell(row, title) for row in shown)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("checkpoint", overflow="fold")
    table.add_column("epoch", justify="right")
    table.add_column("state")
    table.add_column("on disk", justify="right", no_wrap=True)
    value = listed.metric if listed.metric != "eval_reward" else None
    for title in [value, *measured] if value else measured:
        table.add_column(title, justify="right", overflow="fold")
    for row in shown:
        numbers = [_cell(row, title) for title in measured]
        name = f"{row.name} ({', '.join(row.links)})" if row.links else row.name
        ranked = [f"{row.value:.4g}" if row.value is not None else ""] if value else []
        place, epoch = str(row.place or ""), "" if row.epoch is None else f"{row.epoch:.4g}"
        table.add_row(place, name, epoch, row.state, "" if row.bytes is None else size(row.bytes), *ranked, *numbers)
    yield table
    if len(listed.rows) > len(shown):
        yield Text(f"and {plural(len(listed.rows) - len(shown), 'other')}: --show-all lists them")
    if listed.best is not None:
        yield Text(f"Best by {listed.strategy}: {listed.best}. {listed.why[:1].upper()}{listed.why[1:]}.")
    else:
        yield Text(f"No best: {listed.why}.")
    for note in listed.notes:
        yield Text(f"Note: {note}.")
    for row in shown:
        if row.state == "torn":
            yield Text(f"{row.name} is torn: {row.flaw}.")


def _cell(row: SavedRow, title: str) -> str:
    return "" if row.evaluation is None else COLUMNS[title][2](row.evaluation)
