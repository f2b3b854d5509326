"""A report as text for a terminal, from the report alone."""

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from grpo_autotune.records.alerts import outcome
from grpo_autotune.records.evaluation_lines import LEGEND, table_lines
from grpo_autotune.records.report import Advice, PartRow, Ranks, Report, StageReport
from grpo_autotune.render.remote import remote_parts
from grpo_autotune.render.rollouts import rollout_lines
from grpo_autotune.render.sentences import facts_lines, header_lines, legend, startup_line
from grpo_autotune.render.text import as_text, section, table_of
from grpo_autotune.units import percent, seconds, size

BAR_CELLS = 16
LEAST_PART_SHARE = 0.005
EVEN_RANKS = 1.02
MOST_RANKS = 16
TITLES = {
    "exact": "What to change: same learning (each line predicted for that change alone)",
    "learning": "What to change: alters what is learned, so check the reward (each line for that change alone)",
}
"""Kind of advice -> the title above it."""
NOTHING = "Nothing: no change that this tool knows is predicted to save one percent of the step."


def render(report: Report, width: int = 100, *, colour: bool = False) -> str:
    """The report as text for a terminal of `width` columns, with ANSI escapes where `colour` is asked for."""
    return as_text(_sections(report, width), width, colour=colour)


def _sections(report: Report, width: int) -> Iterator[RenderableType]:
    for line in header_lines(report):
        yield Text(line)
    for line in report.warnings:
        yield Text(f"\nWARNING: {line}", style="bold red")
    yield Text("")
    yield stage_table(report)
    yield Padding(Text(legend(report), style="dim"), (0, 0, 0, 2))
    yield from section("What bounds it", [report.bound])
    yield from section("Before the first step", [startup_line(report)] if report.startup else [])
    yield from section("Tokens, images and rewards", facts_lines(report))
    remote, tables = remote_parts(report)
    yield from section("Rewards over a network", remote)
    yield from (Padding(table, (0, 0, 0, 2)) for table in tables)
    yield from section("vLLM", rollout_lines(report))
    watched = [outcome(report.monitors, report.alerts)] if report.monitors else []
    yield from section("Monitors", [*watched, *(alert.line() for alert in report.alerts)])
    lines = table_lines(report.evaluations, width - 2)
    yield from section("Evaluations", [*lines, LEGEND] if lines else [])
    if report.ranks is not None:
        yield Text("\nRanks", style="bold")
        yield rank_table(report)
        yield each_rank_table(report.ranks)
        for straggler in report.ranks.stragglers:
            yield Text(
                f"Straggler: rank {straggler.rank} works {seconds(straggler.extra_s)} per step longer than the others, "
                f"most of it in {straggler.stage}; each of them waits {seconds(straggler.others_wait_s)} per step "
                "longer than it."
            )
    yield from _verdict(report)


def stage_table(report: Report) -> Table:
    """One row per stage that ran, slowest first, its parts indented below it."""
    with_limit = any(row.limit_share is not None for row in report.stages)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("stage" if report.ranks is None else f"stage (rank {report.rank})", "one step", no_wrap=True)
    table.add_column("time", seconds(report.step_s), justify="right", no_wrap=True)
    table.add_column("spread", f"± {seconds(report.step_spread_s)}", justify="right", no_wrap=True)
    table.add_column("share", percent(1.0), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("per token", justify="right", no_wrap=True)
    if with_limit:
        table.add_column("of limit", justify="right", no_wrap=True)
    table.add_column("peak memory", justify="right", no_wrap=True)
    for row in sorted(report.stages, key=lambda stage: -stage.self_s):
        if row.self_s == 0.0 and row.calls == 0.0:
            continue
        table.add_row(*_stage_cells(row, with_limit))
        for part in _parts_worth_a_row(row):
            table.add_row(f"  {part.name}", seconds(part.self_s), "", percent(part.share), style="dim")
        if row.hidden_s > 0.0:
            table.add_row("  beside the step", seconds(row.hidden_s), style="dim")
    return table


def _parts_worth_a_row(row: StageReport) -> list[PartRow]:
    """The two log-prob passes; other stages' parts where they are large and say more than the stage's own row."""
    if row.name == "policy_logprob":
        return row.parts
    large = [part for part in row.parts if part.share >= LEAST_PART_SHARE]
    return large if len(large) > 1 or row.name in ("log_save_eval", "sync_wait") else []


def _stage_cells(row: StageReport, with_limit: bool) -> list[str]:
    per_token = "" if row.ms_per_token is None else f"{row.ms_per_token:.3f} ms"
    limit = "" if row.limit_share is None else f"{percent(row.limit_share)} {row.limited_by}"
    return [
        row.name,
        seconds(row.self_s),
        f"± {seconds(row.spread)}",
        percent(row.share),
        "█" * round(min(1.0, max(0.0, row.share)) * BAR_CELLS),
        per_token,
        *([limit] if with_limit else []),
        "" if row.peak_bytes is None else size(row.peak_bytes),
    ]


def rank_table(report: Report) -> Table:
    """One row per stage: the mean of the ranks, and the longest."""
    columns = ("mean of ranks", "longest", "on")
    table = table_of("stage", *columns, right=columns)
    for row in report.ranks.stages if report.ranks else []:
        if row.slowest_s > 0.0:
            which = f"rank {row.slowest_rank}" if row.slowest_s > EVEN_RANKS * row.mean_s else "all alike"
            table.add_row(row.name, seconds(row.mean_s), seconds(row.slowest_s), which)
    return table


def each_rank_table(ranks: Ranks) -> Table:
    """One row per rank: its step, its own work, its wait; of many ranks those that work longest."""
    columns = ("rank", "step", "works", "waits")
    table = table_of(*columns, right=columns)
    longest = sorted(ranks.rows, key=lambda row: -row.compute_s)[:MOST_RANKS]
    for row in sorted(longest, key=lambda row: row.rank):
        table.add_row(str(row.rank), seconds(row.step_s), seconds(row.compute_s), seconds(row.wait_s))
    return table


def _verdict(report: Report) -> Iterator[RenderableType]:
    for kind, title in TITLES.items():
        if entries := [advice for advice in report.verdict if advice.kind == kind]:
            yield Text(f"\n{title}", style="bold")
            yield Padding(_numbered(entries), (0, 0, 0, 1))
    yield from section("What to change", [] if report.verdict else [NOTHING])


def _numbered(entries: list[Advice]) -> Table:
    table = Table.grid(Column(justify="right", no_wrap=True), Column(), padding=(0, 1))
    for number, advice in enumerate(entries, start=1):
        table.add_row(f"{number}.", Text(advice.text))
    return table
