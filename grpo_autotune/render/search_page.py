"""The page of a search: the race, the trials, the models, and what was not proven, from `search.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from grpo_autotune.records.search import Candidate, SearchReport, TrialRow
from grpo_autotune.render import pictures as draw
from grpo_autotune.render.page import Diff, Lines, Picture, Section, Table, from_rich
from grpo_autotune.render.probe_page import machine_sections
from grpo_autotune.render.search import (
    changes,
    contribution_table,
    error_lines,
    failure_lines,
    gain_lines,
    guard_line,
    headline,
    how_contributions,
    pareto_table,
)
from grpo_autotune.report.configuration import tuned_diff
from grpo_autotune.units import percent, seconds, size


def search_title(report: SearchReport) -> str:
    """The heading of the page."""
    if not report.best.changed:
        return f"A search: your configuration stays, {seconds(report.baseline.step_s)} per step"
    how = "predicted" if report.predicted else "raced" if report.best.raced else "measured"
    return f"A search: x {report.best.speedup:.2f} useful completions per second, {how}"


def search_sections(report: SearchReport) -> list[Section]:
    """The sections of the page."""
    lines = headline(report)
    guards = [guard_line(guard) for guard in report.guards]
    skipped = [f"{row.count} combinations: {row.why}" for row in report.skipped]
    pareto = [from_rich(pareto_table(report))] if report.pareto else []
    return [
        Section("race", "The race", [Lines(lines[:1]), Lines(lines[1:], strong=True), _race(report)]),
        Section("trials", "Trials", list(_trials(report))),
        Section("models", "Predicted against measured", list(_predictions(report))),
        Section("contributions", "What each change brought", list(_contributions(report))),
        Section("guards", "What changes what is learned", [Lines(guards)] if guards else []),
        Section("pareto", "Speed against reward and memory: nothing here is beaten in all three", pareto),
        Section("configurations", "The tuned configurations", list(_diffs(report))),
        Section("skipped", "Not run", [Lines(skipped)] if skipped else []),
        Section("notes", "Notes", [Lines(report.notes)] if report.notes else []),
        *machine_sections(report.machine, {}, report.config),
    ]  # fmt: skip


def _written(report: SearchReport) -> Iterator[tuple[str, Candidate]]:
    """The configurations that were written and differ from one another, by their files' names."""
    seen = [report.baseline.knobs]
    names = ("tuned.yaml", "tuned.exact.yaml", "tuned.fast.yaml")
    for name, one in zip(names, (report.best, report.best_exact, report.best_fast), strict=True):
        if one.knobs not in seen:
            seen.append(one.knobs)
            yield name, one


def _race(report: SearchReport) -> Picture:
    """Seconds per step of the user's configuration and of those that were written."""
    rows = [("your configuration", report.baseline.step_s, report.baseline.step_s_ci, "")]
    rows += [
        (name, one.step_s, one.step_s_ci, changes(one.changed, report.baseline.knobs)) for name, one in _written(report)
    ]
    points = [{"name": name, "value": value, "low": ci[0], "high": ci[-1]} for name, value, ci, _ in rows if ci]
    cells = [(name, seconds(value), " to ".join(map(seconds, ci)), told) for name, value, ci, told in rows]
    table = Table(("configuration", "per step", f"interval at {percent(report.confidence)}", "changes"), cells)
    words = ", ".join(f"{name} {seconds(value)}" for name, value, _, _ in rows)
    note = "Each by its own trials; the sentence above has the ratio of the race, where there was one."
    alt, chart = f"Seconds per step with intervals: {words}", draw.intervals(points, "seconds per step")
    return draw.picture("Seconds per step", alt, chart, table, note)


def _trials(report: SearchReport) -> Iterator[Picture | Lines]:
    at, rows, cells = 0.0, [], []
    for trial in report.trials:
        rows.append({"trial": trial.number, "lane": trial.purpose, "status": trial.status, "begin": at / 60,
                     "end": (at + trial.elapsed_s) / 60, "why": trial.why or ""})  # fmt: skip
        at += trial.elapsed_s
        cells.append(_trial_cells(trial, report))
    columns = ("trial", "purpose", "by", "status", "per step", "predicted", "memory", "took", "changes, or reason")
    failed = sum(trial.status != "ok" for trial in report.trials)
    alt = f"{len(rows)} trials one after the other over {seconds(at)}, coloured by status; {failed} failed"
    note = "One after the other by the time that each took; those of a race ran side by side."
    yield draw.picture("Trials over time", alt, draw.trials(rows), Table(columns, cells, "trial"), note)
    if failed:
        yield Lines(list(failure_lines(report)), title="Trials that failed")


def _trial_cells(trial: TrialRow, report: SearchReport) -> tuple[object, ...]:
    baseline = report.baseline.knobs
    changed = {key: value for key, value in trial.knobs.items() if key in baseline and value != baseline[key]}
    return (
        str(trial.number), trial.purpose, trial.source, trial.status,
        "" if trial.step_s is None else seconds(trial.step_s),
        "" if trial.predicted_s is None else seconds(trial.predicted_s),
        "" if trial.peak_bytes is None else size(trial.peak_bytes), seconds(trial.elapsed_s),
        trial.why or changes(changed, baseline),
    )  # fmt: skip


def _predictions(report: SearchReport) -> Iterator[Picture | Lines]:
    both = [(t.number, t.predicted_s, t.step_s) for t in report.trials if t.predicted_s and t.step_s]
    error = report.model_error.get("step")
    if both:
        rows = [{"trial": number, "predicted": predicted, "measured": took} for number, predicted, took in both]
        cells = [(str(n), seconds(p), seconds(m), f"{(p / m - 1) * 100:+.0f}%") for n, p, m in both]
        band = error.p90 if error is not None and math.isfinite(error.p90) else 0.0
        off = f"; the band holds nine of ten, within {percent(band)}" if band else ""
        alt = f"Predicted against measured seconds per step of {len(both)} trials{off}"
        table = Table(("trial", "predicted", "measured", "off by"), cells)
        yield draw.picture(
            "Seconds per step", alt, draw.predicted(rows, band), table, f"On the line a prediction is right{off}."
        )
    if lines := list(error_lines(report)):
        yield Lines(lines)


def _contributions(report: SearchReport) -> Iterator[Picture | Table | Lines]:
    if lines := list(gain_lines(report)):
        yield Lines(lines)
    if not report.contributions:
        return
    rows = [
        {"name": changes({c.key: c.after}, {c.key: c.before}), "value": c.factor,
         "low": c.factor if c.low is None else c.low, "high": c.factor if c.high is None else c.high}
        for c in report.contributions if c.factor is not None
    ]  # fmt: skip
    table = from_rich(contribution_table(report.contributions))
    words = ", ".join(f"{row['name']} x {row['value']:.2f}" for row in rows)
    if rows:
        chart = draw.intervals(rows, "times as fast as without it", one=True)
        yield draw.picture("How many times faster", f"What each change brought: {words}", chart, table)
    else:
        yield table
    yield Lines([how_contributions(report)])


def _diffs(report: SearchReport) -> Iterator[Diff | Lines]:
    for name, one in _written(report):
        yield Lines([f"Changes {changes(one.changed, report.baseline.knobs)}."], title=name)
        if lines := tuned_diff(report.config, one.knobs):
            yield Diff(lines)
