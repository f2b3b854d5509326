"""A comparison of runs as text for a terminal, from the comparison alone."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.comparison import ComparedRun, Comparison, Pair, RatioRow
from grpo_autotune.render.text import as_text, section
from grpo_autotune.units import amount, percent, plural, seconds

STYLES = {"faster": "green", "slower": "red", "within noise": ""}
MEANING = (
    "Change: lower end, middle and upper end. The step's interval holds at {sure}, those of the stages at {sure} all "
    "together; both count in that a machine's pace differs between runs, which the steps of one run cannot show. "
    "Within noise: the interval holds zero, or the difference is under 1% of the step. Runs in turns tell more: "
    "`grpo-autotune search` races its winner."
)


def render_comparison(comparison: Comparison, width: int = 100, *, colour: bool = False) -> str:
    """The comparison as text for a terminal of `width` columns, with ANSI escapes where `colour` is asked for."""
    return as_text(_sections(comparison), width, colour=colour)


def _sections(comparison: Comparison) -> Iterator[RenderableType]:
    for pair in comparison.pairs:
        yield Text(headline(comparison.baseline, pair), style="bold")
        for sentence in pair.differences:
            yield Text(f"Before you compare: {sentence}.", style="yellow")
        yield Text("")
        yield comparison_table(pair)
        facts = [f"{name}: {_known(old)} -> {_known(new)}" for name, (old, new) in pair.facts.items()]
        yield from section("Beside the seconds", facts)
        yield from section("Changed keys", [f"{key} {old} -> {new}" for key, (old, new) in pair.changed.items()])
        yield Text("")
    yield Padding(Text(MEANING.format(sure=percent(comparison.confidence)), style="dim"), (0, 0, 0, 2))


def headline(base: ComparedRun, pair: Pair) -> str:
    """The verdict on one run: its seconds per step against the baseline's, and one of the three words."""
    row, steps = pair.step, f"{plural(base.steps, 'step')} and {plural(pair.run.steps, 'step')}"
    times = f"{seconds(row.before_s)} -> {seconds(row.after_s)}"
    return f"{base.name} -> {pair.run.name}: step {times}  change {change_text(row)}  {row.word} ({steps})"


def change_text(row: RatioRow) -> str:
    """The change with the ends of its interval in percent, and the factor for equal work where there is one."""
    ends = "[? ? ?]" if row.change is None else "[{:+.0f} {:+.0f} {:+.0f}]".format(*(100.0 * end for end in row.change))
    return f"{ends} %" + (f" (x {row.scale:.3g} for equal work)" if abs(row.scale - 1.0) > 0.0005 else "")


def comparison_table(pair: Pair) -> Table:
    """The step and every stage that ran in either, the longest first."""
    table = Table("stage", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("baseline", justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("run", justify="right", no_wrap=True)
    table.add_column("change")
    table.add_column("verdict", no_wrap=True)
    for row in [pair.step, *sorted(pair.stages, key=lambda row: -max(row.before_s, row.after_s))]:
        word = Text(row.word, style=STYLES[row.word])
        table.add_row(row.name, seconds(row.before_s), "->", seconds(row.after_s), change_text(row), word)
    return table


def _known(value: float | None) -> str:
    return "not known" if value is None else amount(value)
