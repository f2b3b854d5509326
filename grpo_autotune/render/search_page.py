"""The page of a search: the race, the trials, the models, and what was not proven, from `search.json`."""

from collections.abc import Iterator

from grpo_autotune.records.search import Candidate, SearchReport
from grpo_autotune.render import pictures as draw
from grpo_autotune.render import search as text
from grpo_autotune.render.page import Block, Diff, Lines, Picture, Section, Table, from_rich
from grpo_autotune.render.probe_page import machine_sections
from grpo_autotune.report.configuration import tuned_diff
from grpo_autotune.units import percent, plural, seconds, size

CHANGES = "changes, or reason"


def search_title(report: SearchReport) -> str:
    """The heading of the page."""
    if not report.best.changed:
        return f"A search: your configuration stays, {seconds(report.baseline.step_s)} per step"
    how = "predicted" if report.predicted else "raced" if report.best.raced else "measured"
    return f"A search: x {report.best.speedup:.2f} useful completions per second, {how}"


def search_sections(report: SearchReport) -> list[Section]:
    """The sections of the page."""
    spent, *outcome = text.headline(report)
    pareto = [from_rich(text.pareto_table(report))] if report.pareto else []
    skipped = [f"{plural(row.count, 'combination')}: {row.why}" for row in report.skipped]
    return [
        Section("race", "The race", [Lines([spent]), Lines(outcome, strong=True), _race(report)]),
        Section("trials", "Trials", list(_trials(report))),
        Section("models", "Predicted against measured", list(_predictions(report))),
        Section("contributions", "What each change brought", list(_contributions(report))),
        Section("guards", "What changes what is learned", [Lines([text.guard_line(guard) for guard in report.guards])]),
        Section("pareto", "Speed against reward and memory: nothing here is beaten in all three", pareto),
        Section("configurations", "The tuned configurations", list(_diffs(report))),
        Section("skipped", "Not run", [Lines(skipped)]),
        Section("notes", "Notes", [Lines(report.notes)]),
        *machine_sections(report.machine, {}, report.config),
    ]


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
    runs = [("your configuration", report.baseline), *_written(report)]
    rows = [{"name": n, "value": r.step_s, "low": min(r.step_s_ci), "high": max(r.step_s_ci)} for n, r in runs
            if r.step_s_ci]  # fmt: skip
    cells = [
        (name, seconds(run.step_s), " to ".join(map(seconds, run.step_s_ci)),
         text.changes(run.changed, report.baseline.knobs))
        for name, run in runs
    ]  # fmt: skip
    table = Table(("configuration", "per step", f"interval at {percent(report.confidence)}", "changes"), cells)
    alt = "Seconds per step with intervals: " + ", ".join(f"{name} {took}" for name, took, *_ in cells)
    note = "Each by its own trials; the sentence above has the ratio of the race, where there was one."
    return draw.picture("Seconds per step", alt, draw.intervals(rows, "seconds per step"), table, note)


def _trials(report: SearchReport) -> Iterator[Block]:
    ends: dict[str | None, float] = {None: 0.0}  # by place: others' trials run beside, those without one alone
    rows = []
    for t in report.trials:
        begin = max(ends.values()) if t.place is None else max(ends[None], ends.get(t.place, 0.0))
        ends[t.place] = end = begin + t.elapsed_s
        row = {"trial": t.number, "lane": t.place or t.purpose, "status": t.status, "why": t.why or ""}
        rows.append({**row, "begin": begin / 60, "end": end / 60})
    knobs = report.baseline.knobs
    cells = [
        (str(t.number), t.purpose, t.source, t.place or "alone", t.status, t.step_s and seconds(t.step_s),
         t.predicted_s and seconds(t.predicted_s), t.peak_bytes and size(t.peak_bytes), seconds(t.elapsed_s),
         t.why or text.changes({k: v for k, v in t.knobs.items() if k in knobs and v != knobs[k]}, knobs))
        for t in report.trials
    ]  # fmt: skip
    columns = ("trial", "purpose", "by", "on", "status", "per step", "predicted", "memory", "took", CHANGES)
    colour = draw.coloured("status", rows, draw.STATUS_COLOURS)
    chart = draw.lanes(rows, "minutes of trials", colour, draw.WIDTH - 60)
    failed = sum(trial.status != "ok" for trial in report.trials)
    beside = len(ends) - 1
    how = f"on {plural(beside, 'worker')}" if beside else "one after the other"
    alt = f"{len(rows)} trials {how} over {seconds(max(ends.values()))}, coloured by status; {failed} failed"
    note = "One after the other by the time that each took, a worker's in its own row; those of a race ran in turns."
    yield draw.picture("Trials over time", alt, chart, Table(columns, cells, "trial"), note)
    yield Lines(list(text.failure_lines(report)), title="Trials that failed")


def _predictions(report: SearchReport) -> Iterator[Block]:
    both = [(t.number, t.predicted_s, t.step_s) for t in report.trials if t.predicted_s and t.step_s]
    if both:
        error = report.model_error.get("step")
        band = error.p90 if error else 0.0
        off = f"; the band holds nine of ten, within {percent(band)}" if band else ""
        rows = [dict(zip(("trial", "predicted", "measured"), row, strict=True)) for row in both]
        cells = [(str(n), seconds(p), seconds(m), f"{(p / m - 1) * 100:+.0f}%") for n, p, m in both]
        table = Table(("trial", "predicted", "measured", "off by"), cells)
        alt, note = f"Seconds per step of {len(both)} trials{off}", f"On the line a prediction is right{off}."
        yield draw.picture("Predicted against measured seconds", alt, draw.predicted(rows, band), table, note)
    yield Lines(list(text.error_lines(report)))


def _contributions(report: SearchReport) -> Iterator[Block]:
    yield Lines(list(text.gain_lines(report)))
    rows = [
        {"name": text.changes({c.key: c.after}, {c.key: c.before}), "value": c.factor,
         "low": c.factor if c.low is None else c.low, "high": c.factor if c.high is None else c.high}
        for c in report.contributions if c.factor is not None
    ]  # fmt: skip
    table = from_rich(text.contribution_table(report.contributions))
    if rows:
        alt = "What each change brought: " + ", ".join(f"{row['name']} x {row['value']:.2f}" for row in rows)
        chart = draw.intervals(rows, "times as fast as without it", one=True)
        yield draw.picture("How many times faster", alt, chart, table)
    elif report.contributions:
        yield table
    yield Lines([text.how_contributions(report)] if report.contributions else [])


def _diffs(report: SearchReport) -> Iterator[Block]:
    for name, one in _written(report):
        yield Lines([f"Changes {text.changes(one.changed, report.baseline.knobs)}."], title=name)
        if lines := tuned_diff(report.config, one.knobs):
            yield Diff(lines)
