"""Rewards over a network, for a terminal and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.report import Report
from grpo_autotune.records.rewards import CallTimes, RemoteCalls
from grpo_autotune.render.text import as_text, table_of
from grpo_autotune.units import amount, percent, seconds

LEFT_OUT = {"name", "batches", "calls", "batch_s", "tokens_in", "tokens_out", "cost", "place"}
PERCENTILES = "p50\n p95\n p99"


def remote_parts(report: Report) -> tuple[list[str], list[Table]]:
    """A sentence on the share of a step that waits for rewards over a network, and their table; nothing without any."""
    if not report.remote:
        return [], []
    stage, rank = report.stage("reward"), "" if report.ranks is None else f" The table is that of rank {report.rank}."
    hidden = f"; {seconds(stage.hidden_s)} are hidden beside other stages" if stage.hidden_s else ""
    line = f"The step waits {seconds(stage.self_s)} ({percent(stage.share)}) for rewards{hidden}.{rank}"
    line += " Wait: in the queue until a call is sent; retry: from the end of the first call to the last one's begin."
    return [line], [_table({one.name: one for one in report.remote})]


def render_sweep(settings: Sequence[RemoteCalls], source: str) -> str:
    """A table for each reward, with a column for each number of calls at once."""
    parts: list[RenderableType] = [Text(f"Rewards of {source}, without a model and with caches off")]
    for name in dict.fromkeys(one.name for one in settings):
        columns = {f"{one.concurrency}": one for one in settings if one.name == name}
        parts += [Text(f"\n{name}"), _table(columns, "calls at once")]
    return as_text(parts, 120, colour=False)


def _table(columns: Mapping[str, RemoteCalls], title: str = "") -> Table:
    """The keys of `report.json` in words; a row of nothing is left out."""
    table = table_of(title, *columns)
    for key in (key for key in RemoteCalls.model_fields if key not in LEFT_OUT):
        values = [getattr(one, key) for one in columns.values()]
        words = "predicted step" if key == "step_s" else key.removesuffix("_s").replace("_", " ")
        if any(values):
            timed = any(isinstance(value, CallTimes) for value in values)
            table.add_row(f"{words}, {PERCENTILES}" if timed else words, *(_cell(key, value) for value in values))
    return table


def _cell(key: str, value: Any) -> str:
    if isinstance(value, CallTimes):
        return "\n".join(map(seconds, (value.p50, value.p95, value.p99)))
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    number = seconds if key.endswith("_s") else amount
    return value if isinstance(value, str) else number(value) if value else ""
