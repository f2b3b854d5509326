"""A plan as text for a terminal and as a page, from the plan alone."""

from collections.abc import Callable, Iterator

from rich import box
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from grpo_autotune.records.plan import Choice, Figure, Plan
from grpo_autotune.render.page import Lines, Section, Table, render_page
from grpo_autotune.render.text import as_text
from grpo_autotune.units import GIB, amount, duration, percent, plural, seconds, size


def render_plan(plan: Plan, width: int = 100) -> str:
    """The plan as text for a terminal of `width` columns."""
    parts: list[Text | RichTable] = [Text(line) for line in summary(plan)]
    for title, table in tables(plan):
        shown = RichTable(
            *(Column(name, overflow="fold") for name in table.columns), box=box.SIMPLE_HEAD, pad_edge=False
        )
        for row in table.rows:
            shown.add_row(*map(str, row))
        parts += [Text(f"\n{title}", style="bold"), shown]
    return as_text(parts, width, colour=False)


def plan_page(plan: Plan) -> str:
    """The plan as a page of HTML."""
    sections = [Section(f"part-{n}", title, [table]) for n, (title, table) in enumerate(tables(plan))]
    first = Section("summary", "In short", [Lines(list(summary(plan)))])
    return render_page("What the run will take", [first, *sections])


def summary(plan: Plan) -> Iterator[str]:
    """The run in sentences."""
    earliest, expected, latest = (end[:16] for end in plan.ends)
    yield from plan.notes
    run = f"{plural(plan.samples, 'sample')} in {plural(plan.steps, 'optimizer step')}"
    yield f"{run}: {_figure(plan.total_s, duration)}. Begun now, it ends at {expected} ({earliest} to {latest})."
    step, sample = _figure(plan.step_s), _figure(plan.sample_s)
    yield f"{sample} per sample (a prompt with its completions), {step} per optimizer step."
    for row in plan.occasions:
        name = "An evaluation" if row.name == "evaluate" else "A checkpoint"
        share = f"{row.times} times {_figure(row.once_s)}, {percent(row.share)} of the run"
        yield f"{name} every {plural(row.every, 'step')} and at the end: {share}."
    every, shared = (sum(getattr(row, key) for row in plan.passes) for key in ("tokens", "shared_tokens"))
    now = sum(row.shared_tokens if row.shares else row.tokens for row in plan.passes)
    yield (
        f"Why so slow: {amount(now)} tokens go through the model for a sample ({amount(every)} without speed-ups, "
        f"{amount(shared)} with all), {now / plan.supervised_tokens:.0f} times the {amount(plan.supervised_tokens)} "
        "of one such row in supervised training; a backward pass counts as two."
    )
    yield f"From {plan.source}. Intervals hold at {percent(plan.confidence)}, the machine's pace counted in."


def tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    """Each table with its title; of an interval the ends stand in brackets."""
    if plan.cadences:
        rows = [(row.every or "off", percent(row.share), _ends(row.total_s, 3600)) for row in plan.cadences]
        yield "Evaluation (predicted)", Table(["eval_steps", "share of the run", "hours"], rows)
    fits = "fits" if plan.memory_bytes is None else f"fits {size(plan.memory_bytes)}"
    columns = ["seconds/sample", "hours", "speed", "GiB at worst", fits]
    for name, choices in plan.tables.items():
        first = f"{name}, tokens" if "image" in name else name
        if len(choices) > 1:
            yield (
                f"By {name} (predicted; seconds/sample now: measured)",
                Table([first, *columns], list(map(_row, choices))),
            )
    budgets = [(name, *("none" if n is None else n for n in values.values())) for name, values in plan.budgets.items()]
    title = "Largest values that fit into a memory, the others as they are (predicted)"
    yield title, Table(["memory", *next(iter(plan.budgets.values()))], budgets)
    columns = ["pass", "rows", "tokens", "tokens, prompt once per group", "shared here"]
    passes = [(name, f"{n:g}", amount(t), amount(s), "yes" if on else "no") for name, n, t, s, on in plan.passes]
    yield "Passes of a sample (counted)", Table(columns, passes)


def _row(row: Choice) -> tuple[str, ...]:
    name = row.name if row.image_tokens is None or "px" not in row.name else f"{row.name}, {amount(row.image_tokens)}"
    remedy = (row.remedy or "").rpartition(".")[2].removesuffix(" true").replace("_", " ")
    fit = "yes" if row.fits else f"no; with {remedy}" if remedy else "no"
    return name, _ends(row.sample_s), _ends(row.total_s, 3600), f"{row.speed:.2g}x", _ends(row.peak_bytes, GIB), fit


def _ends(value: Figure, unit: float = 1.0) -> str:
    ends = (amount(float(f"{end / unit:.2g}")) for end in value[1:3])
    return "{} [{} {}]".format(amount(value.value / unit), *ends)


def _figure(value: Figure, unit: Callable[[float], str] = seconds) -> str:
    return "{} ({} to {}, {})".format(*map(unit, value[:3]), value.how)
