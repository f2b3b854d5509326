"""A plan as text for a terminal, from the plan alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from grpo_autotune.records.plan import Choice, Figure, Plan
from grpo_autotune.render.page import Lines, Section, from_rich, render_page
from grpo_autotune.render.text import as_text
from grpo_autotune.units import GIB, amount, duration, percent, plural, seconds

PREDICTED = "predicted, but for what is now; in brackets the ends of the interval"


def render_plan(plan: Plan, width: int = 100) -> str:
    """The plan as text for a terminal of `width` columns."""
    return as_text(_shown(plan), width, colour=False)


def _shown(plan: Plan) -> Iterator[RenderableType]:
    yield from (Text(line) for line in summary(plan))
    for title, table in tables(plan):
        yield Text(f"\n{title}", style="bold")
        yield table


def plan_page(plan: Plan) -> str:
    """The plan as a page of HTML."""
    sections = [Section(f"part-{n}", title, [from_rich(table)]) for n, (title, table) in enumerate(tables(plan))]
    first = Section("summary", "In short", [Lines(list(summary(plan)))])
    return render_page("What the run will take", [first, *sections])


def summary(plan: Plan) -> Iterator[str]:
    """The run in sentences."""
    earliest, expected, latest = plan.ends
    yield from plan.notes
    run = f"{plural(plan.samples, 'sample')} in {plural(plan.steps, 'optimizer step')}"
    yield f"{run}: {_figure(plan.total_s, duration)}. Begun now, it ends at {expected} ({earliest} to {latest})."
    step, sample = _figure(plan.step_s), _figure(plan.sample_s)
    yield f"{sample} per sample (a prompt with its completions), {step} per optimizer step."
    for row in plan.occasions:
        name = "An evaluation" if row.name == "evaluate" else "A checkpoint"
        share = f"{row.times} times {_figure(row.once_s)}, {percent(row.share)} of the run"
        yield f"{name} every {plural(row.every, 'step')}: {share}."
    every, shared = (sum(getattr(row, key) for row in plan.passes) for key in ("tokens", "shared_tokens"))
    now = sum(row.shared_tokens if row.shares else row.tokens for row in plan.passes)
    yield (
        f"Why so slow: {amount(now)} tokens go through the model for a sample ({amount(every)} without speed-ups, "
        f"{amount(shared)} with all), {now / plan.supervised_tokens:.0f} times the {amount(plan.supervised_tokens)} "
        "of one such row in supervised training; a backward pass counts as two."
    )
    yield f"From {plan.source}. Intervals hold at {percent(plan.confidence)}, the machine's pace counted in."


def tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    """Each table with its title."""
    cadences = [
        (row.every if row.every > 0 else "off", percent(row.share), _ends(row.total_s, 3600)) for row in plan.cadences
    ]
    if cadences:
        yield "Evaluation (predicted)", _table(["eval_steps", "share of the run", "hours"], cadences)
    for name, choices in plan.tables.items():
        columns = [
            f"{name}, tokens" if "image" in name else name,
            "seconds/sample",
            "hours",
            "speed",
            "GiB at worst",
            "fits",
        ]
        rows = [
            (f"{row.name}, {amount(row.image_tokens or 0)}" if "image" in name else row.name,
             _ends(row.sample_s), _ends(row.total_s, 3600), f"{row.speed:.2g}x", _ends(row.peak_bytes, GIB), _fits(row))
            for row in choices
        ]  # fmt: skip
        if len(rows) > 1:
            yield f"{name[0].upper()}{name[1:]} ({PREDICTED})", _table(columns, rows)
    budgets = [(name, *("none" if n is None else n for n in values.values())) for name, values in plan.budgets.items()]
    keys = next(iter(plan.budgets.values()), {})
    yield (
        "Largest values that fit into a memory, the others as they are (predicted)",
        _table(["memory", *keys], budgets),
    )
    columns = ["pass", "rows", "tokens", "tokens, prompt once per group", "shared here"]
    passes = [(name, f"{n:g}", amount(t), amount(s), "yes" if on else "no") for name, n, t, s, on in plan.passes]
    yield "Passes of a sample (counted)", _table(columns, passes)


def _table(columns: list[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in columns), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table


def _fits(row: Choice) -> str:
    return "yes" if row.fits else f"no; with {row.remedy}" if row.remedy else "no"


def _ends(value: Figure, unit: float = 1.0) -> str:
    ends = (amount(float(f"{end / unit:.2g}")) for end in value[1:3])
    return "{} [{} {}]".format(amount(value.value / unit), *ends)


def _figure(value: Figure, unit: Callable[[float], str] = seconds) -> str:
    return "{} ({} to {}, {})".format(*map(unit, value[:3]), value.how)
