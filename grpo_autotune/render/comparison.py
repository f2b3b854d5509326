"""A comparison of runs as text for a terminal and as a page, from the comparison alone."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.comparison import Comparison, Pair, RatioRow
from grpo_autotune.render.text import as_text, sections, table_of
from grpo_autotune.units import amount, percent, plural, seconds

MEANING = (
    "Change: lower end, middle and upper end, at {sure} for the step and at {sure} for all stages together; that the "
    "machine's pace differs between runs is counted in. `run x 0.5`: times 0.5 for equal work. Within noise: zero is "
    "inside, or it is under 1% of the step. Runs in turns tell more: `grpo-autotune search` races its winner."
)


def render_comparison(comparison: Comparison, width: int = 100) -> str:
    """The comparison as text for a terminal of `width` columns."""
    parts: list[RenderableType] = []
    for p in comparison.pairs:
        parts += [*map(Text, _verdict(comparison.baseline, p)), Text(""), _table(p), *sections(_notes(p)), Text("")]
    return as_text([*parts, Text(MEANING.format(sure=percent(comparison.confidence)))], width, colour=False)


def comparison_page(comparison: Comparison) -> str:
    """The comparison as a page: a bar of stages for each run, then each run against the baseline."""
    from grpo_autotune.render import pictures as draw
    from grpo_autotune.render.page import Lines, Section, Table, from_rich, render_page

    base, pairs = comparison.baseline, comparison.pairs
    spent = [(base, row.name, row.before_s) for row in pairs[0].rows[1:]]
    spent += [(pair.run, row.name, row.after_s) for pair in pairs for row in pair.rows[1:]]
    stages = list(dict.fromkeys(stage for _, stage, _ in spent))
    bars = [{"step": run, "stage": stage, "seconds": s, "order": stages.index(stage)} for run, stage, s in spent]
    chart = draw.stacked_steps(bars, "run")
    table = Table(("run", "stage", "seconds"), [(run, stage, seconds(s)) for run, stage, s in spent])
    picture = draw.picture("One step", "A bar for each run, split by stage", chart, table)
    sections = [Section("runs", "Where a step goes", [picture])]
    for number, pair in enumerate(pairs, start=1):
        verdict = Lines(_verdict(base, pair), strong=True)
        below = [Lines(lines, title=title) for title, lines in _notes(pair).items() if lines]
        sections += [Section(f"run-{number}", f"{pair.run} against {base}", [verdict, from_rich(_table(pair)), *below])]
    words = Lines([MEANING.format(sure=percent(comparison.confidence))])
    return render_page(f"{base} compared", [*sections, Section("meaning", "How to read it", [words])])


def _verdict(base: str, pair: Pair) -> list[str]:
    """The warnings; then one run's seconds per step against the baseline's, and one of the three words."""
    row, (before, after) = pair.rows[0], pair.steps
    times = f"step {seconds(row.before_s)} -> {seconds(row.after_s)}  change {_change(row)}  {row.word}"
    warnings = [f"Before you compare: {sentence}." for sentence in [*pair.apart, *pair.differences]]
    return [*warnings, f"{base} -> {pair.run}: {times} ({plural(before, 'step')} and {plural(after, 'step')})"]


def _change(row: RatioRow) -> str:
    """The change with the ends of its interval, in percent or as factors, and the factor for equal work."""
    if row.change is None:
        return "too few steps" if row.before_s and row.after_s else "new" if row.after_s else "gone"
    large = row.change[2] >= 10.0
    ends = [amount(1.0 + end) if large else f"{round(100.0 * end):+d}" for end in row.change]
    text = f"x [{', '.join(ends)}]" if large else f"[{' '.join(ends)}] %"
    return text + (f" (run x {row.scale:.3g})" if row.scale != 1.0 else "")


def _table(pair: Pair) -> Table:
    """The step and every stage that ran in either, the longest first."""
    table = table_of("stage", "baseline", "", "run", "change", "verdict", right=("baseline", "run"))
    for row in pair.rows:
        table.add_row(row.name, seconds(row.before_s), "->", seconds(row.after_s), _change(row), row.word)
    return table


def _notes(pair: Pair) -> dict[str, list[str]]:
    """Title -> lines of what stands below the table."""
    facts = {name: ["unknown" if n is None else amount(n) for n in both] for name, both in pair.facts.items()}
    notes = {"Beside the seconds": facts, "Changed keys": pair.changed}
    return {title: [f"{name}: {old} -> {new}" for name, (old, new) in both.items()] for title, both in notes.items()}
