"""Rewards over a network, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.report import Report
from grpo_autotune.records.rewards import CallTimes, RemoteCalls, RewardSweep
from grpo_autotune.render.text import as_text
from grpo_autotune.units import amount, percent, seconds

CELLS = {
    "calls at once": "concurrency",
    "rows measured": "rows",
    "calls per step": "calls_per_step",
    "tokens per step": "tokens_per_step",
    "cost per step": "cost_per_step",
    "cost of the run's steps": "cost_per_run",
    "first call": "first_call_s",
    "in the queue, p50\n  p95\n  p99": "wait_s",
    "a call, p50\n  p95\n  p99": "call_s",
    "first to last try, p50\n  p95\n  p99": "retry_s",
    "answers of status 429": "rate_limited",
    "retries": "retries",
    "rows by fall-back": "fallbacks",
    "rows from the cache": "cache_hits",
    "rows without a score": "failures",
    "rows scored by": "providers",
    "a step, predicted": "step_s",
}
"""Row of the table -> what it shows; a row of nothing is left out."""


def calls_table(columns: Mapping[str, RemoteCalls]) -> Table:
    """A column for each reward, or for each setting of one."""
    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="right")
    for words, key in CELLS.items():
        if any(cells := [_cell(key, getattr(one, key)) for one in columns.values()]):
            table.add_row(words, *cells)
    return table


def _cell(key: str, value: Any) -> str:
    if isinstance(value, CallTimes):
        return "\n".join(map(seconds, (value.p50, value.p95, value.p99)))
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return "" if not value else seconds(value) if key.endswith("_s") else amount(value)


def remote_table(report: Report) -> Table:
    """A column for each reward over a network."""
    return calls_table({f"{one.name} ({one.kind})": one for one in report.remote})


def waiting(report: Report) -> list[str]:
    """The share of a step that waits for rewards over a network; no line without any."""
    if not report.remote:
        return []
    stage, rank = report.stage("reward"), "" if report.ranks is None else f" The table is that of rank {report.rank}."
    hidden = f"; {seconds(stage.hidden_s)} are hidden beside other stages" if stage.hidden_s else ""
    return [f"The step waits {seconds(stage.self_s)} ({percent(stage.share)}) for rewards{hidden}.{rank}"]


def render_sweep(sweep: RewardSweep) -> str:
    """A table for each reward, with a column for each number of calls at once."""
    return as_text(_sweep(sweep), 120, colour=False)


def _sweep(sweep: RewardSweep) -> Iterator[RenderableType]:
    yield Text(f"Rewards of {sweep.source}, without a model and with caches off")
    for name in dict.fromkeys(one.name for one in sweep.settings):
        columns = {f"{one.concurrency or 'all'}": one for one in sweep.settings if one.name == name}
        yield Text(f"\n{name}", style="bold")
        yield calls_table(columns)
    for key, lanes in sweep.best.items():
        yield Text(f"Shortest step: set {key} to {lanes}.")
