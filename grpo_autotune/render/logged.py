"""A report of another framework's log as text for a terminal and as a page, from the report alone."""

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.imported import LogReport
from grpo_autotune.render.text import as_text, sections
from grpo_autotune.units import amount, listing, percent, plural, seconds

BAR_CELLS = 16
LEFT = ("what the others leave of the step",)


def render_log(report: LogReport, width: int = 100) -> str:
    """The report as text for a terminal of `width` columns."""
    head = [*_header(report), *(f"\nWARNING: {line}" for line in report.warnings)]
    table: list[RenderableType] = [Text(""), stage_table(report)] if report.stages else []
    return as_text([*map(Text, head), *table, *sections(_notes(report))], width, colour=False)


def log_page(report: LogReport) -> str:
    """The report as a page."""
    from grpo_autotune.render.page import Lines, Section, from_rich, render_page
    from grpo_autotune.render.probe_page import step_picture, steps_picture

    head = [Lines([report.bound], strong=True), Lines(report.warnings, title="Warnings", strong=True)]
    split = [step_picture(report), *steps_picture(report)] if report.stages else []
    table = [from_rich(stage_table(report), anchor="stage")] if report.stages else []
    notes = [Lines(lines, title=title) for title, lines in _notes(report).items()]
    title = f"A step of {report.framework}: {seconds(report.step_s)}"
    return render_page(
        title,
        [
            Section("summary", "In short", [*head, Lines(list(_header(report)))]),
            Section("step", "Where a step goes", split),
            Section("stages", "Stages", table),
            Section("notes", "What the log says, and what it does not", notes),
        ],
    )


def stage_table(report: LogReport) -> Table:
    """One row for each of the log's timers, longest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("stage", "one step", no_wrap=True)
    table.add_column("time", seconds(report.step_s), justify="right", no_wrap=True)
    table.add_column("spread", f"± {seconds(report.step_spread_s)}", justify="right", no_wrap=True)
    table.add_column("share", percent(1.0), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.stages:
        bar = "█" * round(min(1.0, max(0.0, row.share)) * BAR_CELLS)
        table.add_row(row.name, seconds(row.self_s), f"± {seconds(row.spread)}", percent(row.share), bar, row.state)
    return table


def _header(report: LogReport) -> Iterator[str]:
    used = f"{plural(len(report.steps), 'step')} used, {report.steps[0]} to {report.steps[-1]}"
    yield f"{seconds(report.step_s)} per {report.counted} of {report.framework} ({report.middle}; {used})"
    spot = f"lines {report.lines[0]} to {report.lines[-1]} of {report.file}"
    yield f"Read from {spot}: seconds by its own clock, from {report.whole}"


def _notes(report: LogReport) -> dict[str, list[str]]:
    lumps = [f"{row.name}: {', '.join(row.holds)}" for row in report.stages if row.state == "lumped"]
    keys = [f"{row.name} = {' '.join(row.keys if row.keys[0] != report.whole else LEFT)}" for row in report.stages]
    strange = [row.name for row in report.stages if row.state == "unknown"]
    absent = ", ".join(report.absent) if report.stages else "every stage"
    absent += f" (or inside {listing(strange)})" if strange else ""
    beside = [f"{name}: {seconds(fact.value)}" for name, fact in report.beside.items()]
    facts = [f"{name}: {_value(name, fact.value)} ({fact.key})" for name, fact in report.facts.items()]
    notes = {
        "What bounds it": [report.bound],
        "Lumped: one timer, and nobody can tell apart": lumps,
        "Keys of the log behind each row": keys,
        "Unknown to this tool: timers of the run's own": strange,
        "Absent: not in this log": [absent],
        "Timers beside the step (means where they are; per request, or outside of it)": beside,
        "Means of the steps used": facts,
        "Against the configuration": report.checks,
        "Skipped": [f"{reason}: {count}" for reason, count in report.skipped.items()],
        "What to change": [advice.text for advice in report.verdict],
    }
    return {title: lines for title, lines in notes.items() if lines}


def _value(name: str, value: float) -> str:
    return percent(value) if name in ("completions cut off", "groups of equal rewards") else amount(value)
