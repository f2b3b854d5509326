"""Pictures of a page as Vega-Lite specifications, in one style and with the same colour for a stage everywhere."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import altair as alt

from grpo_autotune.records.imported import TRAINING_PASS
from grpo_autotune.records.probe import STAGES
from grpo_autotune.records.trial import Status
from grpo_autotune.render.page import Picture, Table, datum

BLUE, ORANGE = "#0072B2", "#E69F00"
# Okabe and Ito's eight but black, then shades between them for what is seldom seen
_STAGES = (BLUE, ORANGE, "#F0E442", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8F4D70", "#6BCFB0", "#3D8FBF",
           "#8A8A8A", "#9A5A2A", "#B8A000", "#BDBDBD")  # fmt: skip
_STATUS = ("#009E73", "#D55E00", "#CC79A7", ORANGE, "#8F4D70", "#8A8A8A", "#56B4E9", "#B8A000")
STAGE_COLOURS = dict(zip(STAGES, _STAGES, strict=True))
LUMPS = {TRAINING_PASS: "#F0A27A", "training forward": "#F6CE6B"}
"""Rows of a log that are no stage."""
UNKNOWN = "#BDBDBD"
STATUS_COLOURS = dict(zip(get_args(Status), _STATUS, strict=True))
WIDTH, NARROW = 820, 380
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
        "gridOpacity": 0.15, "tickCount": 8, "labelLimit": 320, "titleFontWeight": "normal",
    },
    "axisY": {"tickCount": 5},
    "legend": {**_INK, "orient": "bottom", "columns": 6, "columnPadding": 16, "labelLimit": 160, "title": None},
    "mark": {"tooltip": {"content": "data"}},
    "bar": {"stroke": "#777", "strokeWidth": 0.3},
    "point": {"filled": True, "opacity": 1},
    "text": {"color": "currentColor", "tooltip": None},
}  # fmt: skip

Rows = Sequence[dict[str, Any]]


def picture(title: str, words: str, chart: Any, table: Table, note: str = "") -> Picture:
    """A picture of a chart, in the style of all pages; `words` say what it shows to whoever does not see it."""
    return Picture(title, words, {**chart.to_dict(validate=False), "config": CONFIG}, table, note)


def chart_of(rows: Iterable[dict[str, Any]], height: int = 150, width: int = NARROW) -> Any:
    """A chart on clean rows: those with a number that is not finite are left out, texts are as a page shows them."""
    finite = (row for row in rows if all(math.isfinite(n) for n in row.values() if isinstance(n, int | float)))
    clean = [{key: datum(value) if isinstance(value, str) else value for key, value in row.items()} for row in finite]
    return alt.Chart(alt.InlineData(values=clean)).properties(width=width, height=height)


def coloured(field: str, rows: Rows, colours: dict[str, str]) -> Any:
    """The colours of those values of the field that there are, with a legend."""
    colours = colours | {row[field]: LUMPS.get(row[field], UNKNOWN) for row in rows if row[field] not in colours}
    shown = [name for name in colours if any(row[field] == name for row in rows)]
    scale = alt.Scale(domain=[datum(name) for name in shown], range=[colours[name] for name in shown])
    return alt.Color(f"{field}:N", title=None, scale=scale)


def lanes(rows: Rows, title: str, colour: Any = alt.Undefined, width: int = WIDTH) -> Any:
    """Bars from `begin` to `end`, one below the other by their `lane`."""
    order = list(dict.fromkeys(datum(row["lane"]) for row in rows))
    x, y = alt.X("begin:Q", title=title), alt.Y("lane:N", title=None, sort=order)
    bars = chart_of(rows, 34 * len(order), width).mark_bar(color=BLUE)
    return bars.encode(x=x, x2=alt.X2("end:Q"), y=y, color=colour).interactive(bind_y=False)


def stacked_bar(shares: Sequence[tuple[str, float]]) -> Any:
    """One bar of stages and their seconds, with the names of those that are wide enough."""
    ends = list(itertools.accumulate((value for _, value in shares), initial=0.0))
    rows = [
        {"lane": "", "stage": stage, "begin": begin, "end": begin + value, "seconds": value,
         "name": stage.replace("_", " ") if value >= LEAST_LABELLED * ends[-1] else ""}
        for (stage, value), begin in zip(shares, ends, strict=False)
    ]  # fmt: skip
    bars = lanes(rows, "seconds of one step", coloured("stage", rows, STAGE_COLOURS))
    ink = alt.ExprRef("luminance(scale('color', datum.stage)) < 0.35 ? '#fff' : '#000'")
    names = chart_of(rows, 34, WIDTH).transform_calculate(middle="(datum.begin + datum.end) / 2")
    return bars + names.mark_text(color=ink, limit=WIDTH // 8).encode(x=alt.X("middle:Q"), text=alt.Text("name:N"))


def stacked_steps(rows: Rows, title: str = "optimizer step") -> Any:
    """A bar for each `step`, its stages one above the other in their `order`, `seconds` high."""
    x = alt.X("step:O", title=title, sort=None, axis=alt.Axis(labelOverlap=True, labelAngle=0))
    bars, colour = chart_of(rows, 220, WIDTH).mark_bar(), coloured("stage", rows, STAGE_COLOURS)
    return bars.encode(x=x, y=alt.Y("seconds:Q", title="seconds"), color=colour, order=alt.Order("order:Q"))


def counts(rows: Sequence[tuple[float, int]], what: str, counted: str) -> Any:
    """A bar for each value, as high as its count."""
    x = alt.X("value:O", title=what, axis=alt.Axis(labelAngle=-40))
    base = chart_of({"value": value, "count": count} for value, count in rows)
    return base.mark_bar(color=BLUE).encode(x=x, y=alt.Y("count:Q", title=counted))


def lines(rows: Rows, x: str, title: str, width: int = NARROW) -> Any:
    """A line of `value` over the field `x` for each `series`, with `low` and `high` where there are bands."""
    names = dict.fromkeys(row["series"] for row in rows)
    colour = coloured("series", rows, dict(zip(names, itertools.cycle((BLUE, *_STATUS)), strict=False)))
    x_axis = alt.X(f"{x}:Q", title=x, axis=alt.Axis(format="d", tickMinStep=1))
    base = chart_of(rows, width=width).encode(x=x_axis, color=colour if len(names) > 1 else alt.ColorValue(BLUE))
    point = alt.OverlayMarkDef(size=16) if len(rows) <= MOST_DOTS else False
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    curve = base.mark_line(point=point, strokeWidth=1.4).encode(y=y)
    banded = any("low" in row for row in rows)
    bands = base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
    return bands + curve if banded else curve.interactive(bind_y=False)


def intervals(rows: Rows, title: str, *, one: bool = False) -> Any:
    """Points with intervals, a row for each `name`: `value`, `low` and `high`; `one` marks the value 1."""
    size = (34 * max(1, len(rows)), WIDTH - 180)
    base = chart_of(rows, *size).encode(y=alt.Y("name:N", title=None, sort=None))
    x = alt.X("low:Q", title=title, scale=alt.Scale(zero=False))
    bars = base.mark_rule(strokeWidth=3, color=BLUE).encode(x=x, x2=alt.X2("high:Q"))
    drawn = bars + base.mark_point(color=ORANGE, size=80).encode(x=alt.X("value:Q"))
    line = chart_of([{"value": 1.0}], *size).mark_rule(color="currentColor", strokeDash=[4, 3])
    return drawn + line.encode(x=alt.X("value:Q")) if one else drawn


def predicted(rows: Rows, band: float) -> Any:
    """`predicted` against `measured` seconds, the line on which both are equal, and a band of relative error."""
    most = max(max(row["predicted"], row["measured"]) for row in rows)
    ends = [{"measured": at, "low": at * max(0.0, 1.0 - band), "high": at * (1.0 + band)} for at in (0.0, most)]
    x = alt.X("measured:Q", title="measured seconds per step")
    dots, edge = chart_of(rows, 260).encode(x=x), chart_of(ends, 260).encode(x=x)
    return (
        edge.mark_area(opacity=0.15, color=BLUE).encode(y=alt.Y("low:Q", title="predicted"), y2=alt.Y2("high:Q"))
        + edge.mark_line(color="currentColor", strokeDash=[4, 3], strokeWidth=1).encode(y=alt.Y("measured:Q"))
        + dots.mark_point(color=ORANGE).encode(y=alt.Y("predicted:Q"))
    )
