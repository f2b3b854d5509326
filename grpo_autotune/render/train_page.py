"""The page of a training run: its curves and evaluations, from `train_log.jsonl`, and the stages of `report.json`."""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from grpo_autotune.records.alerts import Alert, Log, number, outcome
from grpo_autotune.records.evaluation_lines import COLUMNS, LEGEND, fitting
from grpo_autotune.records.evaluations import Evaluation, EvaluationLog, evaluations
from grpo_autotune.records.report import Report
from grpo_autotune.render import pictures as draw
from grpo_autotune.render.page import Block, Lines, Picture, Section, Table
from grpo_autotune.render.probe_page import machine_sections, stage_blocks, step_picture, steps_picture, summary
from grpo_autotune.units import plural, seconds

MOST_COLUMNS = 10**6
"""Columns of text that a page has room for: it can be moved sideways."""

MOST_POINTS = 300
"""Points of a curve; those of a longer run are means of as many neighbours as that takes."""

CURVES = (
    ("Reward", "mean reward", {"reward": "reward"}),
    ("KL to the reference", "nats per token", {"kl": "kl"}),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Completion lengths", "tokens", {"completions/mean_length": "mean", "completions/max_length": "longest"}),
    ("Truncated completions", "share", {"completions/clipped_ratio": "truncated"}),
    ("Groups without a signal", "share", {"frac_reward_zero_std": "equal rewards"}),
    ("Seconds per step", "seconds", {"step_s": "all", "step_time": "the step alone"}),
    ("Gradient", "norm", {"grad_norm": "gradient norm"}),
)
"""Title of a curve, its axis, and the keys that are drawn, each with its name."""
BY_BRANCH = {"reward": "mean reward", "kl": "nats per token", "beta": "weight of the KL term"}  # axes


def train_title(log: Log, report: Report | None, *, running: bool) -> str:
    """The heading of the page."""
    model = f" of {report.trainer.model_class}" if report is not None else ""
    state = ", still running" if running else "" if report else ", without a report: it runs, or was killed"
    return f"A training run{model}: step {max(row['step'] for row in log)}{state}"


def train_sections(
    log: Log, report: Report | None, config: dict[str, Any] | None = None, alerts: Sequence[Alert] = ()
) -> list[Section]:
    """The sections of the page; `report` is there once the run is over, `config` what runs until then."""
    blocks: list[Block] = []
    if report:
        blocks = [Lines([summary(report)]), step_picture(report), *steps_picture(report), *stage_blocks(report)]
    fired = [(alert.name, alert.text, alert.remedy) for alert in alerts]
    told: list[Block] = [Lines([f"{outcome(report.monitors, alerts)}."])] if report and report.monitors else []
    told += [Table(("alert", "what was seen", "what to do"), fired, anchor="alert")] if fired else []
    rows = EvaluationLog(log).table()
    facts = (report.machine, report.versions | report.runtime, report.config) if report else (None, {}, config)
    return [
        Section("summary", "In short", [Lines(_summary(log), strong=True)]),
        Section("alerts", "Alerts", told),
        Section("evaluations", "Evaluations", list(_evaluations((report and report.evaluations) or rows))),
        Section("curves", "Training", [picture for curve in _curves(log) for picture in _curve(log, *curve)]),
        Section("stages", "Where a step goes", blocks),
        *machine_sections(*facts),
    ]


def _points(log: Log, key: str, kind: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], n) for row in log if row["kind"] == kind and (n := number(row, key)) is not None]


def _summary(log: Log) -> list[str]:
    rewards, took = _points(log, "reward"), sorted(value for _, value in _points(log, "step_s"))
    told = []
    if rewards:
        tail = [value for _, value in rewards[-max(1, len(rewards) // 10) :]]
        last = f"{math.fsum(tail) / len(tail):.3g} over the last {plural(len(tail), 'log event')}"
        told.append(f"Mean reward {rewards[0][1]:.3g} at first, {last}.")
    if took:
        told.append(f"{seconds(took[len(took) // 2])} per step at the median.")
    done = evaluations(log)
    for name in dict.fromkeys(row.series for row in done):
        same = [row for row in done if row.series == name]
        best = max(same, key=lambda row: row.scored)
        told.append(
            f"Reward on {name} data {best.scored:.3g} ({best.low:.3g} to {best.high:.3g}) at step "
            f"{best.step}, the highest of {plural(len(same), 'evaluation')}."
        )
    last_s = number(log[-1], "time")
    if last_s is not None and 0.0 <= last_s < 1e11:
        told.append(f"Last log event: {datetime.fromtimestamp(last_s, UTC):%Y-%m-%d %H:%M} UTC.")
    return told or ["Nothing was logged yet."]


def _curves(log: Log) -> Iterator[tuple[str, str, dict[str, str]]]:
    """`CURVES`, and those of branches, in training and held out."""
    yield from CURVES
    for before, words in (("branch/", ""), ("eval_branch/", ", held out")):
        for metric, axis in BY_BRANCH.items():
            keys = {key for row in log for key in row if key.startswith(before) and key.endswith(f"/{metric}")}
            yield f"Branches: {metric}{words}", axis, {key: key.split("/")[1] for key in sorted(keys)}


def _curve(log: Log, title: str, axis: str, keys: dict[str, str]) -> Iterator[Picture]:
    rows = [
        {"step": step, "value": value, "series": name}
        for key, name in keys.items()
        for step, value in _thinned(_points(log, key, "eval" if key.startswith("eval_") else "train"))
    ]
    ends = {row["series"]: row["value"] for row in rows}
    alt = f"{title} over steps; at the end: " + ", ".join(f"{name} {value:.3g}" for name, value in ends.items())
    table = Table(("step", "series", axis), [(str(r["step"]), r["series"], f"{r['value']:.4g}") for r in rows])
    if rows:
        yield draw.picture(title, alt, draw.lines(rows, "step", axis), table)


def _thinned(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """At most `MOST_POINTS` points: means of as many neighbours as that takes, at the last one's step."""
    width = -(-len(points) // MOST_POINTS) or 1
    for at in range(0, len(points), width):
        part = points[at : at + width]
        yield part[-1][0], math.fsum(value for _, value in part) / len(part)


def _evaluations(rows: Sequence[Evaluation]) -> Iterator[Block]:
    """The held-out reward over steps, and the whole table."""
    titles = fitting(rows, len(rows) and MOST_COLUMNS)
    table = Table(titles, [[COLUMNS[title][2](row) for title in titles] for row in rows], caption=LEGEND)
    points = [
        {"step": row.step, "series": row.series, "value": row.scored, "low": row.low, "high": row.high}
        for row in rows
        if row.eval_reward is not None
    ]
    alt = "Held-out reward over steps with intervals; the sentences at the top have the highest"
    if points:
        yield draw.picture("Held-out reward", alt, draw.lines(points, "step", "mean reward", draw.WIDTH), table)
    elif rows:
        yield table
