"""Text of what was imported: a configuration, each setting of the source by its line; a probe's split of what another
framework's timers hold together; and the report of a log, as text and as a page."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.imported import STRICT, VERDICTS, Imported, ImportedRow, LogReport, Verdict, titled
from grpo_autotune.records.report import Report
from grpo_autotune.render.text import as_text, section, sections
from grpo_autotune.units import amount, listing, percent, plural, seconds

STYLES: dict[Verdict, str] = {
    "changes": "bold yellow", "none": "bold red", "converted": "cyan", "speed": "dim",
}  # fmt: skip
MOST_OF_VALUE = 120  # characters that are shown of a value
LONG = 40  # characters above which words get a line of their own, and are not said twice


def render_imported(imported: Imported, width: int, *, colour: bool = False) -> str:
    """The table by line, the defaults that had to be written out, counts, and warnings."""
    return as_text(_parts(imported), width, colour=colour)


def _parts(imported: Imported) -> Iterator[RenderableType]:
    name = titled(imported.source, imported.version)
    yield Text(f"{imported.file}: {name} ({imported.version_from})")
    yield Text(batch_line(imported))
    for line in imported.warnings:
        yield Text(f"\nWARNING: {line}", style="bold red")
    given = [row for row in imported.rows if row.line is not None]
    defaults = [row for row in imported.rows if row.line is None]
    yield from _block("What the file says, by line", given)
    yield from _block(f"Defaults of {name} that had to be written out", defaults)
    yield from section("In short", list(summary_lines(imported)))


def batch_line(imported: Imported) -> str:
    """The batch in words."""
    numbers, steps, ranks = imported.numbers, imported.steps_per_rollout, imported.world_size
    per_rollout = f"{steps:g} per rollout" if steps >= 1 else f"one for {1 / steps:g} rollouts"
    return (
        f"Batch: {numbers['P']} prompts x {numbers['G']} completions per rollout; optimizer steps of "
        f"{numbers['C']} completions, {per_rollout}; written for {ranks} process{'es' * (ranks > 1)}"
    )


def _block(title: str, rows: list[ImportedRow]) -> Iterator[RenderableType]:
    if not rows:
        return
    yield Text(f"\n{title}", style="bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    with_lines = any(row.line is not None for row in rows)
    if with_lines:
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    said: dict[str, str] = {}
    for row in rows:
        cells = [Text(VERDICTS.get(row.kind, row.kind), style=STYLES.get(row.kind, "")), _sentence(row, said)]
        table.add_row(*([place_of(row)] if with_lines else []), *cells)
    yield Padding(table, (0, 0, 0, 1))


def _sentence(row: ImportedRow, said: dict[str, str]) -> Text:
    """`key = value -> targets`, and the note; of either, what an earlier row has said is named by that row."""
    becomes = ", ".join(
        path if value == row.value and len(row.to) == 1 else f"{path}: {_value(value)}"
        for path, value in row.to.items()
    )
    target, note = (f"as {said[words]}" if words in said else words for words in (becomes, row.why))
    said |= {words: said.get(words, named(row)) for words in (becomes, row.why) if len(words) > LONG}
    text = Text(f"{row.key} = {_value(row.value)}", overflow="fold")
    text.append(f" -> {target}" if target else "", style="bold")
    if not note or note == target:
        return text
    is_inline = row.kind == "same" or note != row.why or len(note) <= LONG
    return text.append(f" ({note})" if is_inline else f"\n{note}", style="dim")


def _value(value: Any) -> str:
    plain = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(plain.split())
    return text if len(text) <= MOST_OF_VALUE else f"{text[: MOST_OF_VALUE - 4]} ..."


def summary_lines(imported: Imported) -> Iterator[str]:
    """Counts of the verdicts; for those after which something else may be learned, where they stand."""
    counts = Counter(VERDICTS.get(row.kind, row.kind) for row in imported.rows)
    yield listing([f"{count} {words}" for words, count in counts.most_common()])
    for verdict in STRICT:
        if names := dict.fromkeys(named(row) for row in imported.rows if row.kind == verdict):
            yield f"{VERDICTS[verdict]}: {', '.join(names)}"


def place_of(row: ImportedRow) -> str:
    """The line of a setting, the file or cell in front where it is not the imported one."""
    return f"{row.file}:{row.line}" if row.file else str(row.line)


def named(row: ImportedRow) -> str:
    """A setting's line in a sentence; the key of a default."""
    return row.key if row.line is None else place_of(row) if row.file else f"line {row.line}"


LUMPS = {"verl": "update_actor", "easyr1": "update_actor"}  # framework -> its timer around the training pass


def split_lines(report: Report, framework: str) -> Iterator[str]:
    """The training pass by forward, backward and optimizer, as measured here."""
    stages = {stage.name: stage for stage in report.stages}
    parts = {part.name: part.self_s for part in stages["policy_logprob"].parts} if "policy_logprob" in stages else {}
    pieces = {"forward": parts.get("training_forward", 0.0)}
    pieces |= {name: stages[name].self_s for name in ("backward", "optimizer") if name in stages}
    whole = sum(pieces.values())
    if whole > 0:
        name = f"{titled(framework)}'s {LUMPS[framework]}" if framework in LUMPS else "The training pass"
        shares = ", ".join(f"{percent(piece / whole)} {part}" for part, piece in pieces.items())
        yield f"{name} holds {shares}: {seconds(whole)} of a step of {seconds(report.step_s)}."
        yield f"That is TRL on this machine, with the imported batch; {titled(framework)} itself was not measured."


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
    middle = "median" if report.counted == "rollout" else "mean"
    used = f"{plural(len(report.steps), 'step')} used, {report.steps[0]} to {report.steps[-1]}"
    yield f"{seconds(report.step_s)} per {report.counted} of {report.framework} ({middle}; {used})"
    spot = f"lines {report.lines[0]} to {report.lines[-1]} of {report.file}"
    yield f"Read from {spot}: seconds by its own clock, from {report.whole}"


def _notes(report: LogReport) -> dict[str, list[str]]:
    lumps = [f"{row.name}: {', '.join(row.holds)}" for row in report.stages if row.state == "lumped"]
    keys = [f"{row.name} = {' '.join(row.keys if row.keys[0] != report.whole else LEFT)}" for row in report.stages]
    strange = [row.name for row in report.stages if row.state == "unknown"]
    absent = ", ".join(report.absent) if report.stages else "every stage"
    absent += f" (or inside {listing(strange)})" if strange else ""
    beside = [f"{name}: {seconds(fact.value)}" for name, fact in report.beside.items()]
    shares = ("completions cut off", "groups of equal rewards")
    facts = [
        f"{name}: {(percent if name in shares else amount)(fact.value)} ({fact.key})"
        for name, fact in report.facts.items()
    ]
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
