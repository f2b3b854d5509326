"""A search's report as text for a terminal; everything comes from the report alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.search import Candidate, Contribution, Guard, ParetoRow, SearchReport
from grpo_autotune.render.text import as_text, section, table_of
from grpo_autotune.units import hms, percent, plural, seconds, size

MOST_ROWS = 8
EACH = (
    "Each: the winner's speed over its speed with that change alone taken back; where these multiply to more than the "
    "gain, its parts in proportion. What is predicted shares the rest."
)


def render_search(report: SearchReport, width: int = 100, *, colour: bool = False) -> str:
    """The report as text for a terminal of `width` columns, with ANSI escapes where `colour` is asked for."""
    return as_text(_sections(report), width, colour=colour)


def _sections(report: SearchReport) -> Iterator[RenderableType]:
    for line in headline(report):
        yield Text(line, style="bold")
    yield from section("How the gain comes about", list(gain_lines(report)))
    if report.contributions:
        yield Padding(contribution_table(report.contributions), (0, 0, 0, 2))
        if len(report.contributions) > 1:
            yield Padding(Text(how_contributions(report), style="dim"), (0, 0, 0, 2))
    yield from section("What changes what is learned", [guard_line(guard) for guard in report.guards])
    if report.pareto:
        yield Text("\nSpeed against reward and memory: nothing here is beaten in all three", style="bold")
        yield Padding(pareto_table(report), (0, 0, 0, 2))
        left_out = len(report.pareto) - len(shown(report))
        if left_out:
            yield Padding(Text(f"and {left_out} more, in {report.files['report']}", style="dim"), (0, 0, 0, 2))
    yield from section("Not run", [f"{plural(row.count, 'combination')}: {row.why}" for row in report.skipped])
    yield from section("Trials that failed", list(failure_lines(report)))
    yield from section("The models", list(error_lines(report)))
    yield from section("Notes", report.notes)
    yield from section("Files", [f"{name}: {path}" for name, path in report.files.items()])


def headline(report: SearchReport) -> list[str]:
    """The outcome in a few sentences."""
    best, baseline = report.best, report.baseline
    timed = sum(row.purpose == "timed" and row.source != "race" for row in report.trials)
    time = f"{hms(report.elapsed_s)} of {hms(report.budget_s)}"
    spent = f"{time}, {plural(timed, 'timed trial')}, {report.points} legal combinations looked at"
    if report.predicted:
        spent = f"a probe alone; {report.points} legal combinations judged by the models"
    end = f"Search: {spent}; ended since {report.why_ended}."
    if best.changed and not best.raced and not report.predicted:
        why = "the search was stopped before" if report.ended == "interrupted" else "no time was left for it"
        end = f"The winner was not raced against your configuration: {why}. {end}"
    if not best.changed:
        tried = sum(
            row.purpose == "timed" and row.status == "ok" and row.knobs != baseline.knobs for row in report.trials
        )
        verdict = "is already the best that was found" if tried or report.predicted else "stays: no other was measured"
        lines = [end, f"Your configuration {verdict}; {seconds(baseline.step_s)} per step."]
    else:
        how = "Predicted" if report.predicted else "Raced" if best.raced else "Measured"
        lines = [
            end,
            f"{how}: {_speed(best)} useful completions per second, interval at {percent(report.confidence)}, "
            f"{seconds(best.baseline_step_s)} -> {seconds(best.step_s)} per step"
            f"{', evaluations apart' if report.evaluation_s else ''}.",
            f"tuned.yaml changes {changes(best.changed, baseline.knobs)}.",
        ]
    if report.others is not None and report.others.matters:
        lines.insert(
            1, f"Warning: {report.others.words} while trials ran: their seconds and predictions are off by it."
        )
    for name, other in (("tuned.exact.yaml", report.best_exact), ("tuned.fast.yaml", report.best_fast)):
        if other.knobs != best.knobs:
            sure = "" if other.raced or report.predicted or not other.changed else ", not raced"
            lines.append(f"{name}: {_speed(other)}{sure}, changes {changes(other.changed, baseline.knobs)}.")
    return lines


def changes(changed: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """`data.image_size 512 -> 256, grpo.num_generations 8 -> 4`; "nothing" of nothing."""
    texts = (f"{key} {value_text(baseline[key])} -> {value_text(value)}" for key, value in changed.items())
    return ", ".join(texts) or "nothing"


def value_text(value: Any) -> str:
    """A knob's value as YAML has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def guard_line(guard: Guard) -> str:
    """The judgement of one value of a learning knob."""
    verdict = "proven" if guard.proven else "not proven"
    more = "" if guard.prompts_needed is None else f"; about {guard.prompts_needed} prompts would settle it"
    return f"{guard.key} {value_text(guard.before)} -> {value_text(guard.after)}: {verdict}, {guard.why}{more}."


def gain_lines(report: SearchReport) -> Iterator[str]:
    """The gain as a product of what exact knobs bring and what learning ones do."""
    if report.exact_share is None or report.best.speedup <= 0.0:
        return
    gain = math.log(report.best.speedup)
    exact, learning = (
        math.exp(part) if part < 700.0 else math.inf
        for part in (gain * report.exact_share, gain * (1.0 - report.exact_share))
    )
    yield (
        f"x {report.best.speedup:.2f} = x {exact:.2f} from exact knobs ({percent(report.exact_share)} of the gain) "
        f"times x {learning:.2f} from knobs that change what is learned."
    )


def how_contributions(report: SearchReport) -> str:
    """The meaning of the contributions, and how far they are from the whole gain."""
    return EACH + (f" Together they bring x {report.together:.2f} more." if report.together > 1.02 else "")


def contribution_table(rows: list[Contribution]) -> Table:
    """A row for each change of the winner."""
    table = table_of("change", "kind", "brings", "", right=("brings",))
    for row in rows:
        brings = "" if row.factor is None else f"x {row.factor:.2f}"
        if row.low is not None and row.high is not None:
            brings += f" ({row.low:.2f} to {row.high:.2f})"
        how = "measured" if row.measured else f"unknown: {row.why}" if row.factor is None else "predicted"
        table.add_row(changes({row.key: row.after}, {row.key: row.before}), row.kind, brings, how)
    return table


def pareto_table(report: SearchReport) -> Table:
    """A row for each combination that is shown."""
    table = table_of("speed", "reward", "memory", "changes", right=("speed", "reward", "memory"))
    for row in shown(report):
        reward = "not measured" if row.reward_difference is None else f"{row.reward_difference:+.3f}"
        reward = "the same" if row.reward_difference == 0.0 else reward
        memory = "" if row.peak_bytes is None else size(row.peak_bytes)
        table.add_row(f"x {row.speedup:.2f}", reward, memory, changes(row.changed, report.baseline.knobs))
    return table


def shown(report: SearchReport) -> list[ParetoRow]:
    """The fastest rows, those of the written files among them."""
    written = [report.best.knobs, report.best_exact.knobs, report.best_fast.knobs]
    files = [row for row in report.pareto if {**report.baseline.knobs, **row.changed} in written]
    others = [row for row in report.pareto if row not in files][: MOST_ROWS - len(files)]
    return [row for row in report.pareto if row in files or row in others]


def failure_lines(report: SearchReport) -> Iterator[str]:
    """A line for each way in which trials failed."""
    for status, count in Counter(row.status for row in report.trials if row.status != "ok").most_common():
        failed = [row for row in report.trials if row.status == status]
        numbers = ", ".join(str(row.number) for row in failed)
        yield f"{status} ({count}): trial {numbers}; the first: {failed[0].why or 'no reason given'}"


def error_lines(report: SearchReport) -> Iterator[str]:
    """A line for each stage of the models, and the load meanwhile."""
    for stage, e in report.model_error.items():
        yield f"{stage}: off by {percent(e.median)} at the median, {percent(e.p90)} at p90 ({plural(e.n, 'trial')})"
    if report.others is not None:
        yield f"meanwhile {report.others.words} (in the middle one of the trials)"


def _speed(candidate: Candidate) -> str:
    return f"x {candidate.speedup:.2f} ({candidate.ci[0]:.2f} to {candidate.ci[1]:.2f})"
