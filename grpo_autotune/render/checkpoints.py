"""The ranked checkpoints of a run as text for a terminal."""

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
MEASURED = {"held-out reward": "eval_reward", "val loss": "eval_loss", "KL": "eval_kl"}
"""Columns that are shown where they fit -> the names in the log."""


def render_checkpoints(listed: CheckpointList, *, show_all: bool = False, width: int | None = None) -> str:
    """The list, the best at the top, and why it is the best."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    return as_text(_parts(listed, width, show_all), width, colour=False)


def _parts(listed: CheckpointList, width: int, show_all: bool) -> Iterator[RenderableType]:
    shown = listed.rows if show_all else listed.rows[:MOST_ROWS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns: dict[str, list[str]] = {
        "": [str(row.place or "") for row in shown],
        "checkpoint": [row.name for row in shown],
        "also": [", ".join(row.links) for row in shown],
        "epoch": ["" if row.epoch is None else f"{row.epoch:.4g}" for row in shown],
        "state": [row.state for row in shown],
        "on disk": ["" if row.bytes is None else size(row.bytes) for row in shown],
    }
    if listed.metric not in (None, "eval_reward"):
        columns[str(listed.metric)] = ["" if row.value is None else f"{row.value:.4g}" for row in shown]
    for title, key in MEASURED.items():
        cells = [_cell(row, title) for row in shown]
        if key != listed.metric or key == "eval_reward":
            columns |= {title: cells} if _width({**columns, title: cells}) <= width and any(cells) else {}
    for title in columns:
        table.add_column(title, justify="left" if title in ("checkpoint", "also", "state") else "right", no_wrap=True)
    for place in range(len(shown)):
        table.add_row(*(cells[place] for cells in columns.values()))
    yield table
    if len(listed.rows) > len(shown):
        yield Text(f"and {plural(len(listed.rows) - len(shown), 'other')}: --show-all lists them")
    if listed.best is not None:
        yield Text(f"Best by {listed.strategy}: {listed.best}. Its {listed.why}.")
    else:
        yield Text(f"No best: {listed.why}.")
    for note in listed.notes:
        yield Text(f"Note: {note}.")
    for row in shown:
        if row.state == "torn":
            yield Text(f"{row.name} is torn: {row.flaw}.")


def _cell(row: SavedRow, title: str) -> str:
    return "" if row.evaluation is None else COLUMNS[title][2](row.evaluation)


def _width(columns: dict[str, list[str]]) -> int:
    """Columns of text of a table, with its gaps."""
    return sum(max(map(len, [title, *cells])) + 2 for title, cells in columns.items())
