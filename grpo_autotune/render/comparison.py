"""A comparison of runs as text for a terminal, from the comparison alone."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.comparison import Comparison, FactRow, Pair, RatioRow
from grpo_autotune.render.text import as_text, section
from grpo_autotune.units import amount, percent, plural, seconds, size

STYLES = {"faster": "green", "slower": "red", "within noise": ""}


def render_comparison(comparison: Comparison, width: int = 100, *, colour: bool = False) -> str:
    """The comparison as text for a terminal of `width` columns, with ANSI escapes where `colour` is asked for."""
    return as_text(_sections(comparison), width, colour=colour)


def _sections(comparison: Comparison) -> Iterator[RenderableType]:
    for pair in comparison.pairs:
        yield Text(headline(comparison, pair), style="bold")
        for difference in pair.differences:
            yield Text(f"Before you compare: {difference.text}.", style="yellow")
        yield Text("")
        yield comparison_table(pair)
        yield from section("Beside the seconds", [fact_line(row) for row in pair.facts])
        yield from section(
            "What the configurations change", [f"{key} {old} -> {new}" for key, (old, new) in pair.changed.items()]
        )
        yield Text("")
    yield Padding(Text(meaning(comparison), style="dim"), (0, 0, 0, 2))


def headline(comparison: Comparison, pair: Pair) -> str:
    """The verdict on one run: its seconds per step against the baseline's, and one of the three words."""
    base = comparison.baseline
    steps = f"{plural(base.steps, 'step')} and {plural(pair.run.steps, 'step')}"
    return f"{base.name} -> {pair.run.name}: {row_line(pair.step)} ({steps})"


def row_line(row: RatioRow) -> str:
    """One row as a line: `generation 3.10 s -> 2.05 s  change [-36 -34 -31] %  faster`."""
    return f"{row.name} {seconds(row.before_s)} -> {seconds(row.after_s)}  {change_text(row)}  {row.word}"


def change_text(row: RatioRow) -> str:
    """The change with the ends of its interval in percent, and whether seconds were scaled for it."""
    ends = "[? ? ?]" if row.change is None else "[{:+.0f} {:+.0f} {:+.0f}]".format(*(100.0 * end for end in row.change))
    return f"change {ends} %" + (f" (x {row.scale:.3g} for equal work)" if abs(row.scale - 1.0) > 0.0005 else "")


def comparison_table(pair: Pair) -> Table:
    """The step and every stage that ran in either, the baseline's longest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("stage", "left"), ("baseline", "right"), ("", "left"), ("run", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("change")
    table.add_column("verdict", no_wrap=True)
    for row in [pair.step, *sorted(pair.stages, key=lambda row: -max(row.before_s, row.after_s))]:
        cells = (row.name, seconds(row.before_s), "->", seconds(row.after_s), change_text(row).removeprefix("change "))
        table.add_row(*cells, Text(row.word, style=STYLES[row.word]))
    return table


def fact_line(row: FactRow) -> str:
    """One fact of both runs: `reward, mean: 0.412 -> 0.418`."""
    return f"{row.name}: {_value(row, row.before)} -> {_value(row, row.after)}"


def _value(row: FactRow, value: float | None) -> str:
    if value is None:
        return "not known"
    known = {"share": percent, "bytes": size, "reward": "{:.3g}".format}
    return known.get(row.unit, amount)(value)


def meaning(comparison: Comparison) -> str:
    """The intervals in words."""
    sure = percent(comparison.confidence)
    return (
        f"Change: lower end, middle and upper end. The step's interval holds at {sure}, those of the stages at {sure} "
        "all together; both count in that a machine's pace differs between runs, which the steps of one run cannot "
        "show. Within noise: the interval holds zero, or the difference is under 1% of the step. Runs in turns tell "
        "more: `grpo-autotune search` races its winner."
    )
