"""Pictures of a page as Vega-Lite specifications, in one style and with the same colour for a stage everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from grpo_autotune.records.probe import STAGES
from grpo_autotune.render.page import Picture, Table, datum

STAGE_COLOURS = {
    "generation": "#0072B2",
    "policy_logprob": "#E69F00",
    "reference_logprob": "#F0E442",
    "reward": "#009E73",
    "backward": "#D55E00",
    "data": "#CC79A7",
    "prompt": "#56B4E9",
    "tools": "#8F4D70",
    "weight_sync": "#6BCFB0",
    "engine": "#3D8FBF",
    "sync_wait": "#8A8A8A",
    "optimizer": "#9A5A2A",
    "log_save_eval": "#B8A000",
    "other": "#BDBDBD",
}
"""Stage -> its colour: Okabe and Ito's eight but black, then shades between them for stages that are seldom seen."""
STATUS_COLOURS = {
    "ok": "#009E73",
    "oom": "#D55E00",
    "hang": "#CC79A7",
    "timeout": "#E69F00",
    "killed": "#8F4D70",
    "crashed": "#8A8A8A",
    "invalid": "#56B4E9",
    "reward_failed": "#B8A000",
}
BLUE, ORANGE = "#0072B2", "#E69F00"
WIDTH, NARROW = 820, 380
LIGHT_LABELS = ("generation", "backward", "tools", "engine", "optimizer", "reward", "sync_wait")
"""Stages whose colour needs white text."""
MOST_DOTS = 60
"""Points of a picture of lines up to which each is a dot."""
LEAST_LABELLED = 0.09
"""Share of a bar from which a stage's name has room in it."""

_INK = {"labelColor": "currentColor", "titleColor": "currentColor"}
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "aria": False,  # a picture's text stands beside it
    "padding": {"left": 24, "right": 12, "top": 4, "bottom": 4},  # a browser's letters may be wider than those measured
    "view": {"stroke": None},
    "axis": {
        **_INK, "domainColor": "currentColor", "tickColor": "currentColor", "gridColor": "currentColor",
        "gridOpacity": 0.15, "tickCount": 8, "labelLimit": 220, "titleFontWeight": "normal",
    },
    "legend": {**_INK, "orient": "bottom", "columns": 6, "labelLimit": 160, "title": None},
    "mark": {"tooltip": {"content": "encoding"}},
    "text": {"color": "currentColor", "tooltip": None},
}  # fmt: skip

Rows = list[dict[str, Any]]


def picture(title: str, words: str, chart: Any, table: Table, note: str = "") -> Picture:
    """A picture of a chart, in the style of all pages; `words` say what it shows to whoever does not see it."""
    spec = chart.to_dict(validate=False)
    return Picture(title, words, {**spec, "config": CONFIG}, table, note)


def chart_of(rows: Iterable[dict[str, Any]], *, height: int | None = None, width: int = WIDTH) -> Any:
    """A chart on clean rows: those with a number that is not finite are left out, texts are as a page shows them."""
    clean = [
        {key: datum(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in rows
        if all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
    ]
    chart = alt.Chart(alt.InlineData(values=clean))
    return chart.properties(width=width) if height is None else chart.properties(width=width, height=height)


def coloured(field: str, names: Iterable[str], colours: dict[str, str]) -> Any:
    """The colours of those of the names that there are, with a legend."""
    seen = set(names)
    shown = [name for name in colours if name in seen]
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=shown, range=[colours[name] for name in shown]))


def seconds_axis(field: str, title: str = "seconds") -> Any:
    """A quantitative x axis of seconds."""
    return alt.X(f"{field}:Q", title=title)


def stacked_bar(shares: Sequence[tuple[str, float]]) -> Any:
    """One bar of stages and their seconds, with the names of those that are wide enough."""
    rows: Rows = []
    total, at = math.fsum(value for _, value in shares) or 1.0, 0.0
    for stage, value in shares:
        label = stage.replace("_", " ") if value / total >= LEAST_LABELLED else ""
        rows.append({"stage": stage, "from": at, "to": at + value, "middle": at + value / 2, "seconds": value,
                     "name": label, "ink": "#fff" if stage in LIGHT_LABELS else "#000"})  # fmt: skip
        at += value
    base = chart_of(rows, height=44)
    x = alt.X("from:Q", title="seconds of one step", scale=alt.Scale(domain=[0, at], nice=False))
    colour = coloured("stage", (stage for stage, _ in shares), STAGE_COLOURS)
    bars = base.mark_bar(stroke="#777", strokeWidth=0.4).encode(x=x, x2="to:Q", color=colour)
    names = base.mark_text(fontSize=11, limit=WIDTH // 8).encode(
        x="middle:Q", text="name:N", color=alt.Color("ink:N", scale=None)
    )
    return alt.layer(bars, names).resolve_scale(color="independent")


def stacked_steps(rows: Rows, stages: Iterable[str], title: str = "optimizer step") -> Any:
    """A bar for each step, its stages one above the other; rows have `step`, `stage`, `seconds` and `order`."""
    return chart_of(rows, height=220).mark_bar(stroke="#777", strokeWidth=0.2).encode(
        x=alt.X("step:O", title=title, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("seconds:Q", title="seconds"),
        color=coloured("stage", stages, STAGE_COLOURS),
        order="order:Q",
    )  # fmt: skip


def timeline(rows: Rows, lanes: Sequence[str]) -> Any:
    """Bars from `begin` to `end` in lanes, coloured by stage; `of` counts the spans in a bar."""
    return chart_of(rows, height=34 * len(lanes)).mark_bar(stroke="#777", strokeWidth=0.3).encode(
        x=seconds_axis("begin", "seconds since the step began"),
        x2="end:Q",
        y=alt.Y("lane:N", title=None, sort=[datum(lane) for lane in lanes]),
        color=coloured("stage", (row["stage"] for row in rows), STAGE_COLOURS),
        tooltip=["stage:N", "part:N", "seconds:Q", "of:Q"],
    )  # fmt: skip


def waterfall(rows: Rows) -> Any:
    """Phases one after the other, each in its own row."""
    return chart_of(rows, height=28 * len(rows), width=WIDTH - 160).mark_bar(color=BLUE).encode(
        x=seconds_axis("begin"), x2="end:Q", y=alt.Y("lane:N", title=None, sort=None)
    )  # fmt: skip


def histogram(bins: Sequence[tuple[str, int]], what: str, counted: str) -> Any:
    """A bar for each bin, by its name and count."""
    rows = [{"bin": name, "count": count} for name, count in bins]
    return chart_of(rows, height=150, width=NARROW).mark_bar(color=BLUE).encode(
        x=alt.X("bin:N", title=what, sort=None, axis=alt.Axis(labelAngle=-40)), y=alt.Y("count:Q", title=counted)
    )  # fmt: skip


def lines(rows: Rows, x: str, ys: Sequence[str], title: str, *, width: int = NARROW) -> Any:
    """Series over `x`, one for each name in `series`; rows have `value`, and `low` and `high` where there are bands."""
    colours = dict(zip(ys, (BLUE, ORANGE, "#009E73", "#CC79A7", "#D55E00", "#56B4E9"), strict=False))
    base = chart_of(rows, height=150, width=width)
    colour = coloured("series", ys, colours) if len(ys) > 1 else alt.value(BLUE)
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    x_axis = alt.X(f"{x}:Q", title=x, axis=alt.Axis(format="d", tickMinStep=1))
    point = alt.OverlayMarkDef(size=16) if len(rows) <= MOST_DOTS else False
    drawn = base.mark_line(point=point, strokeWidth=1.4).encode(x=x_axis, y=y, color=colour)
    if not any("low" in row for row in rows):
        return drawn
    return alt.layer(base.mark_rule(strokeWidth=1.4).encode(x=x_axis, y="low:Q", y2="high:Q", color=colour), drawn)


def intervals(rows: Rows, title: str, *, one: bool = False) -> Any:
    """Points with intervals, a row for each `name`; rows have `value`, `low` and `high`; `one` marks the value 1."""
    base = chart_of(rows, height=34 * max(1, len(rows)), width=WIDTH - 180)
    y = alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    x = alt.Scale(zero=False)
    bars = base.mark_rule(strokeWidth=3, color=BLUE).encode(x=alt.X("low:Q", title=title, scale=x), x2="high:Q", y=y)
    points = base.mark_point(filled=True, size=80, color=ORANGE, opacity=1).encode(x=alt.X("value:Q", scale=x), y=y)
    line = (
        chart_of([{"value": 1.0}], height=34 * max(1, len(rows)), width=WIDTH - 180)
        .mark_rule(color="currentColor", strokeDash=[4, 3])
        .encode(x="value:Q")
    )
    return alt.layer(bars, points, line) if one else alt.layer(bars, points)


def in_order(stages: Iterable[str]) -> list[str]:
    """Stages in the order of the step's table of stages."""
    seen = set(stages)
    return [stage for stage in STAGES if stage in seen]


def trials(rows: Rows) -> Any:
    """Trials from `begin` to `end` minutes, a lane for each purpose, coloured by status."""
    lanes = list(dict.fromkeys(row["lane"] for row in rows))
    base = chart_of(rows, height=34 * max(1, len(lanes)), width=WIDTH - 60)
    return base.mark_bar(stroke="#777", strokeWidth=0.3).encode(
        x=seconds_axis("begin", "minutes of trials"), x2="end:Q", y=alt.Y("lane:N", title=None, sort=lanes),
        color=coloured("status", (row["status"] for row in rows), STATUS_COLOURS),
        tooltip=["trial:Q", "status:N", "why:N"],
    )  # fmt: skip


def predicted(rows: Rows, band: float) -> Any:
    """`predicted` against `measured` seconds, the line on which both are equal, and a band of relative error."""
    most = max(max(row["predicted"], row["measured"]) for row in rows)
    ends = [{"at": at, "low": at * max(0.0, 1.0 - band), "high": at * (1.0 + band)} for at in (0.0, most)]
    size = {"height": 260, "width": NARROW}
    area = chart_of(ends, **size).mark_area(opacity=0.15, color=BLUE).encode(x="at:Q", y="low:Q", y2="high:Q")
    line = (
        chart_of(ends, **size)
        .mark_line(color="currentColor", strokeDash=[4, 3], strokeWidth=1)
        .encode(x="at:Q", y="at:Q")
    )
    dots = chart_of(rows, **size).mark_point(filled=True, color=ORANGE, stroke="#777", strokeWidth=0.5, opacity=1)
    points = dots.encode(
        x=seconds_axis("measured", "measured seconds per step"), y=alt.Y("predicted:Q", title="predicted"),
        tooltip=["trial:Q", "predicted:Q", "measured:Q"],
    )  # fmt: skip
    return alt.layer(area, line, points)
