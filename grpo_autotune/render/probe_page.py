"""The page of a probe: where a step goes, as pictures and tables, from `report.json` and `spans.jsonl`."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_autotune.records.imported import LogReport
from grpo_autotune.records.report import Report
from grpo_autotune.render import pictures as draw
from grpo_autotune.render.page import Block, Lines, Picture, Section, Table, from_rich
from grpo_autotune.render.remote import remote_parts
from grpo_autotune.render.rollouts import rollout_lines
from grpo_autotune.render.search import value_text
from grpo_autotune.render.sentences import PHASE_WORDS, facts_lines, header_lines, legend, startup_line
from grpo_autotune.render.terminal import rank_table, stage_table
from grpo_autotune.report.configuration import settings
from grpo_autotune.report.timeline import bars_of, rank_files, read_spans
from grpo_autotune.units import amount, percent, seconds, size

MOST_STEPS = 64
"""Steps that the bars of single steps show: the last ones."""


def probe_title(report: Report) -> str:
    """The heading of the page."""
    return f"A GRPO step of {report.trainer.model_class}: {seconds(report.step_s)}"


def probe_sections(report: Report, folder: Path) -> list[Section]:
    """The sections of the page; `folder` holds the spans, without which the timeline is left out."""
    headers, warnings = list(filter(None, header_lines(report))), Lines(report.warnings, title="Warnings", strong=True)
    lines, tables = remote_parts(report)
    return [
        Section("summary", "In short", [Lines([summary(report)], strong=True), warnings, Lines(headers)]),
        Section("step", "Where a step goes", [step_picture(report)]),
        Section("timeline", "Timeline", list(_timeline(report, folder))),
        Section("steps", "Step by step", list(steps_picture(report))),
        Section("advice", "What to change", list(_advice(report))),
        Section("stages", "Stages", list(stage_blocks(report))),
        Section("work", "Tokens, images and rewards", list(_work(report))),
        Section("remote", "Rewards over a network", [Lines(lines), *map(from_rich, tables)]),
        Section("startup", "Before the first step", list(_startup(report))),
        Section("vllm", "vLLM and the fidelity of its samples", [Lines(rollout_lines(report))]),
        *machine_sections(report.machine, report.versions | report.runtime, report.config),
    ]


def summary(report: Report) -> str:
    """The bound of the step, and the exact change that is predicted to save most."""
    exact = [advice for advice in report.verdict if advice.kind == "exact" and advice.predicted_saving]
    if not exact:
        return f"{report.bound} No change that learns the same is predicted to save one percent of it."
    best = max(exact, key=lambda advice: advice.predicted_saving or 0.0)
    saving = f"{seconds(best.predicted_saving or 0.0)} ({percent(best.predicted_share or 0.0)})"
    what = ", ".join(f"{c.key} {value_text(c.after)}" for c in best.changes) or best.text.partition(":")[0]
    return f"{report.bound} The best exact change, {what}, is predicted to save {saving} of it."


def step_picture(report: Report | LogReport) -> Picture:
    """The stages of the median step in one bar."""
    shares = [(row.name, row.self_s, row.share) for row in report.stages if row.self_s > 0.0]
    largest = sorted(shares, key=lambda row: -row[1])[:3]
    words = ", ".join(f"{name} {percent(share)}" for name, _, share in largest)
    alt = f"One bar of {seconds(report.step_s)}, split by stage; the largest: {words}"
    table = Table(("stage", "time", "share"), [(name, seconds(s), percent(share)) for name, s, share in shares])
    return draw.picture("The median step by stage", alt, draw.stacked_bar([row[:2] for row in shares]), table)


def _timeline(report: Report, folder: Path) -> Iterator[Picture]:
    """The fastest, the median and the slowest step, as far as spans of them are stored."""
    ranked = [step for _, step in sorted(zip(report.step_seconds, report.steps, strict=False))]
    places = {0: "fastest", (len(ranked) - 1) // 2: "median", len(ranked) - 1: "slowest"}
    files = dict(rank_files(folder))
    bars = [
        bar
        for (place, word), (rank, path) in itertools.product(places.items(), files.items() if ranked else ())
        for spans in read_spans(path, ranked[place : place + 1]).values()
        for bar in bars_of(spans, f"{word}, step {spans.step}" + (f", {rank}" if len(files) > 1 else ""))
    ]
    rows = [{**bar._asdict(), "seconds": bar.seconds} for bar in bars]
    cells = [(b.lane, b.stage, b.part, f"{b.begin:.4f} s", seconds(b.seconds), b.spans) for b in bars]
    table = Table(("lane", "stage", "part", "begin", "length", "spans"), cells)
    chart = draw.lanes(rows, "seconds since the step began", draw.coloured("stage", rows, draw.STAGE_COLOURS))
    alt = f"Stages over time in {len({bar.lane for bar in bars})} lanes, which the table below has as {len(bars)} bars"
    note = "On the host's clock; spans under 0.3% of the step are merged with their neighbours, and counted."
    if bars:
        yield draw.picture("The fastest, the median and the slowest step", alt, chart, table, note)


def steps_picture(report: Report | LogReport) -> Iterator[Picture]:
    """A bar for each of the last steps."""
    stages = [row for row in report.stages if row.per_step_s]
    steps = report.steps[-MOST_STEPS:]
    if not stages or len(steps) < 2:
        return
    rows = [
        {"step": step, "stage": row.name, "seconds": spent, "order": order}
        for order, row in enumerate(stages)
        for step, spent in zip(steps, row.per_step_s[-MOST_STEPS:], strict=False)
    ]
    columns = [map(seconds, row.per_step_s[-MOST_STEPS:]) for row in stages]
    table = Table(("step", *(row.name for row in stages)), list(zip(map(str, steps), *columns, strict=False)))
    of = "each step" if len(steps) == len(report.steps) else f"the last {len(steps)} of {len(report.steps)} steps"
    alt = f"A bar for {of}, split by stage; the median of all steps is {seconds(report.step_s)}"
    yield draw.picture(f"Seconds of {of}", alt, draw.stacked_steps(rows), table)


def _advice(report: Report) -> Iterator[Lines]:
    for kind, title in {"exact": "Same learning", "learning": "Alters what is learned: check the reward"}.items():
        texts = [advice.text for advice in report.verdict if advice.kind == kind]
        yield Lines(texts, numbered=True, title=f"{title} (each predicted for that change alone)")
    if not report.verdict:
        yield Lines(["No change that this tool knows is predicted to save one percent of the step."])


def stage_blocks(report: Report) -> Iterator[Table | Lines]:
    """The table of stages, and that of ranks."""
    yield from_rich(stage_table(report), anchor="stage")
    yield Lines([legend(report)])
    if report.ranks is not None:
        yield from_rich(rank_table(report), caption="Ranks")


def _work(report: Report) -> Iterator[Block]:
    yield Lines(facts_lines(report))
    tokens, images = report.tokens, report.images
    spreads = {"prompt tokens": tokens.prompt, "completion tokens": tokens.completion} if tokens else {}
    more = {"pixels per image": images.pixels, "tokens per image": images.tokens} if images else {}
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = [(name, *(amount(getattr(s, key)) for key in columns)) for name, s in (spreads | more).items() if s]
    if rows:
        yield Table(("quantity", *columns), rows, caption="Lengths and sizes")
    if tokens and tokens.pass_rates:
        counted = sorted(Counter(round(rate, 2) for rate in tokens.pass_rates).items())
        alt = f"{len(tokens.pass_rates)} groups by the share of their completions whose first reward is at least 0.5"
        chart = draw.counts(counted, "pass rate", "groups")
        yield draw.picture("Pass rates of the groups", alt, chart, Table(("pass rate", "groups"), counted))
    sizes = {int(side): count for side, count in images.tokens_at.items() if side.isdecimal()} if images else {}
    if sizes:
        rows = [(f"{side} px", amount(count)) for side, count in sizes.items()]
        alt = "Tokens of an image by its longest side: " + ", ".join(f"{side} {count}" for side, count in rows)
        points = [{"longest side": side, "value": count, "series": ""} for side, count in sizes.items()]
        chart = draw.lines(points, "longest side", "tokens per image")
        yield draw.picture("Image size against tokens", alt, chart, Table(("longest side", "tokens"), rows))


def _startup(report: Report) -> Iterator[Lines | Picture]:
    if not report.startup:
        return
    yield Lines([startup_line(report)])
    ends = itertools.accumulate((phase.seconds for phase in report.startup), initial=0.0)
    rows: list[dict[str, Any]] = [
        {"lane": PHASE_WORDS.get(phase.name, phase.name), "begin": begin, "end": end}
        for phase, (begin, end) in zip(report.startup, itertools.pairwise(ends), strict=True)
    ]
    table = Table(("phase", "seconds"), [(row["lane"], seconds(row["end"] - row["begin"])) for row in rows])
    chart = draw.lanes(rows, "seconds", width=draw.WIDTH - 160)
    yield draw.picture("Start-up, phase after phase", startup_line(report), chart, table)


def machine_sections(
    machine: dict[str, Any] | None, versions: dict[str, str], config: dict[str, Any] | None
) -> Iterator[Section]:
    """Machine, versions, and the configuration with values that differ from the defaults first."""
    known = {key: value for key, value in (machine or {}).items() if value}
    gpus, packages = known.pop("gpus", []), known.pop("versions", {})
    cells = [(k, size(v) if k.endswith("_bytes") and isinstance(v, int) else v) for k, v in known.items()]
    cells += [("gpu", gpu.get("name") if isinstance(gpu, dict) else gpu) for gpu in gpus]
    cells += sorted((versions | packages).items())
    yield Section("machine", "Machine and versions", [Table(("what", "value"), cells)] if cells else [])
    rows = [(key, value_text(value), origin) for key, value, origin in settings(config or {})]
    yield Section("configuration", "Configuration", [Table(("key", "value", "from"), rows)] if rows else [])
