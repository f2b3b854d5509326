"""The page of a probe: where a step goes, as pictures and tables, from `report.json` and `spans.jsonl`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_autotune.records.probe import Spread
from grpo_autotune.records.report import Report
from grpo_autotune.render import pictures as draw
from grpo_autotune.render.page import SECRET_KEY, Lines, Picture, Section, Table, from_rich
from grpo_autotune.render.rollouts import rollout_lines
from grpo_autotune.render.sentences import PHASE_WORDS, facts_lines, header_lines, legend, startup_line
from grpo_autotune.render.terminal import rank_table, stage_table
from grpo_autotune.report.configuration import settings
from grpo_autotune.report.timeline import Bar, bars_of, rank_files, read_spans, stage_seconds
from grpo_autotune.units import amount, percent, seconds

MOST_STEPS = 64
"""Steps that the bars of single steps show: the last ones."""


def probe_title(report: Report) -> str:
    """The heading of the page."""
    return f"A GRPO step of {report.trainer.model_class}: {seconds(report.step_s)}"


def probe_sections(report: Report, folder: Path) -> list[Section]:
    """The sections of the page; `folder` holds the spans, without which the timeline is left out."""
    headers = [line for line in header_lines(report) if line]
    return [
        Section("summary", "In short", [Lines([summary(report)], strong=True), *_warnings(report), Lines(headers)]),
        Section("step", "Where a step goes", [step_picture(report)]),
        *_time_sections(report, folder),
        Section("advice", "What to change", list(_advice(report))),
        Section("stages", "Stages", list(stage_blocks(report))),
        Section("work", "Tokens, images and rewards", list(_work(report))),
        Section("startup", "Before the first step", list(_startup(report))),
        Section(
            "vllm", "vLLM and the fidelity of its samples", [Lines(rows)] if (rows := rollout_lines(report)) else []
        ),
        *machine_sections(report.machine, report.versions | report.runtime, report.config),
    ]


def summary(report: Report) -> str:
    """The bound of the step, and the exact change that is predicted to save most."""
    exact = [advice for advice in report.verdict if advice.kind == "exact" and advice.predicted_saving]
    if not exact:
        return f"{report.bound} No change that learns the same is predicted to save one percent of it."
    best = max(exact, key=lambda advice: advice.predicted_saving or 0.0)
    saving = f"{seconds(best.predicted_saving or 0.0)} ({percent(best.predicted_share or 0.0)})"
    what = ", ".join(f"{change.key} {_text(change.after)}" for change in best.changes) or best.text.partition(":")[0]
    return f"{report.bound} The best exact change, {what}, is predicted to save {saving} of it."


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _warnings(report: Report) -> list[Lines]:
    return [Lines(report.warnings, title="Warnings", strong=True)] if report.warnings else []


def step_picture(report: Report) -> Picture:
    """The stages of the median step in one bar."""
    shares = [(row.name, row.self_s) for row in report.stages if row.self_s > 0.0]
    rows = [(name, seconds(value), percent(value / report.step_s)) for name, value in shares if report.step_s]
    largest = sorted(shares, key=lambda row: -row[1])[:3]
    words = ", ".join(f"{name} {percent(value / report.step_s)}" for name, value in largest if report.step_s)
    alt = f"One bar of {seconds(report.step_s)}, split by stage; the largest: {words}"
    return draw.picture(
        "The median step by stage", alt, draw.stacked_bar(shares), Table(("stage", "time", "share"), rows)
    )


def _time_sections(report: Report, folder: Path) -> Iterator[Section]:
    """The timeline of three steps, and the bars of all."""
    shown = report.steps[-MOST_STEPS:]
    chosen = _chosen(report)
    files = list(rank_files(folder))
    main = read_spans(files[0][1], {*shown, *chosen})
    chosen = {step: words for step, words in chosen.items() if step in main}
    bars: list[Bar] = []
    for step, words in chosen.items():
        for name, path in files:
            spans = main if path == files[0][1] else read_spans(path, {step})
            lane = f"{words}, step {step}" if len(files) == 1 else f"{words}, step {step}, {name}"
            bars += bars_of(spans[step], lane) if step in spans else []
    if bars:
        yield Section("timeline", "Timeline", [_timeline(bars, list(chosen))])
    if len(shown) > 1:
        yield Section("steps", "Step by step", [_steps(report, shown, {n: stage_seconds(s) for n, s in main.items()})])


def _chosen(report: Report) -> dict[int, str]:
    """The fastest, the median and the slowest step."""
    ranked = [step for _, step in sorted(zip(report.step_seconds, report.steps, strict=False))]
    if len(ranked) < 3:
        return {step: f"number {place}" for place, step in enumerate(ranked, start=1)}
    return {ranked[0]: "fastest", ranked[(len(ranked) - 1) // 2]: "median", ranked[-1]: "slowest"}


def _timeline(bars: Sequence[Bar], steps: Sequence[int]) -> Picture:
    rows = [
        {"lane": bar.lane, "stage": bar.stage, "part": bar.part, "begin": bar.start_s, "end": bar.end_s,
         "seconds": bar.seconds, "of": bar.count}
        for bar in bars
    ]  # fmt: skip
    cells = [(bar.lane, bar.stage, bar.part, f"{bar.start_s:.4f} s", seconds(bar.seconds), bar.count) for bar in bars]
    table = Table(("lane", "stage", "part", "begin", "length", "spans"), cells)
    lanes = list(dict.fromkeys(bar.lane for bar in bars))
    alt = f"Stages over the time of the steps {', '.join(map(str, steps))}, in {len(lanes)} lanes"
    note = "On the host's clock; spans under 0.3% of the step are merged with their neighbours."
    return draw.picture("The fastest, the median and the slowest step", alt, draw.timeline(rows, lanes), table, note)


def _steps(report: Report, shown: Sequence[int], by_stage: dict[int, dict[str, float]]) -> Picture:
    took = dict(zip(report.steps, report.step_seconds, strict=False))
    told = {step: by_stage.get(step) or {"other": took.get(step, math.nan)} for step in shown}
    stages = draw.in_order(stage for split in told.values() for stage in split)
    rows = [
        {"step": step, "stage": stage, "seconds": split[stage], "order": stages.index(stage)}
        for step, split in told.items()
        for stage in split
    ]
    cells = [(step, *(seconds(split[s]) if s in split else "" for s in stages)) for step, split in told.items()]
    of = f"the last {len(shown)} of {len(report.steps)} steps" if len(shown) < len(report.steps) else "each step"
    middle = statistics.median(report.step_seconds) if report.step_seconds else 0.0
    alt = f"A bar for {of}, split by stage; their median is {seconds(middle)}"
    note = "On the host's clock." if by_stage else "Without spans.jsonl a step's stages are not known."
    return draw.picture(
        f"Seconds of {of}", alt, draw.stacked_steps(rows, stages), Table(("step", *stages), cells), note
    )


def _advice(report: Report) -> Iterator[Lines]:
    titles = {"exact": "Same learning", "learning": "Alters what is learned: check the reward"}
    for kind, title in titles.items():
        texts = [advice.text for advice in report.verdict if advice.kind == kind]
        if texts:
            yield Lines(texts, numbered=True, title=f"{title} (each predicted for that change alone)")
    if not report.verdict:
        yield Lines(["No change that this tool knows is predicted to save one percent of the step."])


def stage_blocks(report: Report) -> Iterator[Table | Lines]:
    """The table of stages, and that of ranks."""
    yield from_rich(stage_table(report), anchor="stage")
    yield Lines([legend(report)])
    if report.ranks is not None:
        yield replace(from_rich(rank_table(report)), caption="Ranks")


def _work(report: Report) -> Iterator[Table | Lines | Picture]:
    yield Lines(facts_lines(report))
    tokens, images = report.tokens, report.images
    spreads = [("prompt tokens", tokens.prompt), ("completion tokens", tokens.completion)] if tokens else []
    spreads += [("pixels per image", images.pixels)] if images else []
    spreads += [("tokens per image", images.tokens)] if images and images.tokens else []
    if spreads:
        rows = [(name, *(amount(value) for value in _five(spread))) for name, spread in spreads]
        yield Table(("", "mean", "p50", "p90", "p99", "max"), rows, caption="Lengths and sizes")
    if report.rewards:
        calls = [(call.name, call.calls, seconds(call.mean_s), seconds(call.max_s)) for call in report.rewards]
        yield Table(("reward function", "calls", "mean", "slowest"), calls)
    if tokens and tokens.pass_rates:
        places = Counter(min(9, int(10 * min(max(rate, 0.0), 1.0) + 1e-9)) for rate in tokens.pass_rates)
        bins = [(f"{at / 10:.1f} to {(at + 1) / 10:.1f}", places[at]) for at in range(10)]
        alt = f"{len(tokens.pass_rates)} groups by the share of their completions whose first reward is at least 0.5"
        chart = draw.histogram(bins, "pass rate", "groups")
        yield draw.picture("Pass rates of the groups", alt, chart, Table(("pass rate", "groups"), bins))
    if images and len(images.tokens_at) > 1:
        sizes = [(f"{side} px", amount(count)) for side, count in images.tokens_at.items()]
        yield Table(("longest side of an image", "tokens"), sizes, caption="Image size against tokens")


def _five(spread: Spread) -> tuple[float, ...]:
    return spread.mean, spread.p50, spread.p90, spread.p99, spread.max


def _startup(report: Report) -> Iterator[Lines | Picture]:
    if not report.startup:
        return
    yield Lines([startup_line(report)])
    at, rows, cells = 0.0, [], []
    for phase in report.startup:
        name = PHASE_WORDS.get(phase.name, phase.name)
        rows.append({"lane": name, "begin": at, "end": (at := at + phase.seconds)})
        cells.append((name, seconds(phase.seconds)))
    table = Table(("phase", "seconds"), cells)
    chart = draw.waterfall(rows)
    yield draw.picture("Start-up, phase after phase", f"{len(rows)} phases, {seconds(at)} in all", chart, table)


def machine_sections(
    machine: dict[str, Any] | None, versions: dict[str, str], config: dict[str, Any] | None
) -> Iterator[Section]:
    """Machine, versions, and the configuration with values that differ from the defaults first."""
    facts = [(key, value) for key, value in (machine or {}).items() if key not in ("versions", "gpus") and value]
    facts += [
        ("gpu", gpu.get("name", "") if isinstance(gpu, dict) else gpu) for gpu in (machine or {}).get("gpus") or []
    ]
    facts += sorted((versions | (machine or {}).get("versions", {})).items())
    yield Section("machine", "Machine and versions", [Table(("", "value"), facts)] if facts else [])
    rows = []
    for key, value, changed in settings(config) if config else []:
        told = "(not shown)" if value is not None and SECRET_KEY.search(key) else _text(value)
        rows.append((key, told, "" if changed is None else "set" if changed else "default"))
    yield Section("configuration", "Configuration", [Table(("key", "value", ""), rows)] if rows else [])
