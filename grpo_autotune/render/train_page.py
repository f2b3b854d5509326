"""The page of a training run: its curves and evaluations, from `train_log.jsonl`, and the stages of `report.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from grpo_autotune.records.report import Report
from grpo_autotune.render import pictures as draw
from grpo_autotune.render.page import Lines, Picture, Section, Table
from grpo_autotune.render.probe_page import machine_sections, stage_blocks, step_picture, summary
from grpo_autotune.units import amount, plural, seconds

MOST_POINTS = 300
"""Points of a curve; those of a longer run are means of as many neighbours as that takes."""
Z = 1.96
"""Standard errors to either side of a mean that hold 95% of it."""
SET = re.compile(r"eval_(?:(.+)_)?runtime")

Log = Sequence[dict[str, Any]]


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


class Evaluation(NamedTuple):
    """One evaluation: mean reward with its interval, over `samples` completions."""

    step: int
    held_out: str
    reward: float
    low: float
    high: float
    samples: int
    seconds: float


def train_title(log: Log, report: Report | None, *, running: bool) -> str:
    """The heading of the page."""
    model = f" of {report.trainer.model_class}" if report is not None else ""
    return f"A training run{model}: step {max(row['step'] for row in log)}{', still running' if running else ''}"


def train_sections(log: Log, report: Report | None) -> list[Section]:
    """The sections of the page; `report` is there once the run is over."""
    blocks = [] if report is None else [Lines([summary(report)]), step_picture(report), *stage_blocks(report)]
    more = [] if report is None else machine_sections(report.machine, report.versions | report.runtime, report.config)
    curves = [block for curve in CURVES for block in _curve(log, *curve)]
    return [
        Section("summary", "In short", [Lines(_summary(log), strong=True)]),
        Section("evaluations", "Evaluations", list(_evaluations(log))),
        Section("curves", "Training", curves),
        Section("stages", "Where a step goes", blocks),
        *more,
    ]


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _summary(log: Log) -> list[str]:
    train = [row for row in log if row["kind"] == "train"]
    rewards = [value for row in train if (value := _number(row, "reward")) is not None]
    took = [value for row in train if (value := _number(row, "step_s")) is not None]
    told = []
    if rewards:
        tail = rewards[-max(1, len(rewards) // 10) :]
        told.append(
            f"Mean reward {rewards[0]:.3g} at first, {math.fsum(tail) / len(tail):.3g} over the last "
            f"{plural(len(tail), 'log event')}."
        )
    if took:
        told.append(f"{seconds(sorted(took)[len(took) // 2])} per step at the median.")
    done = evaluations(log)
    for name in dict.fromkeys(one.held_out for one in done):
        same = [one for one in done if one.held_out == name]
        best = max(same, key=lambda one: one.reward)
        told.append(
            f"Held-out reward{name and f' on {name}'} {best.reward:.3g} ({best.low:.3g} to {best.high:.3g}) at step "
            f"{best.step}, the highest of {plural(len(same), 'evaluation')}."
        )
    last = _number(log[-1], "time")
    if last is not None and 0.0 <= last < 1e11:
        told.append(f"Last log event: {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC.")
    return told or ["Nothing was logged yet."]


def _curve(log: Log, title: str, axis: str, keys: dict[str, str]) -> Iterator[Picture]:
    rows: draw.Rows = []
    for key, name in keys.items():
        seen = [
            (row["step"], value) for row in log if row["kind"] == "train" and (value := _number(row, key)) is not None
        ]
        rows += [{"step": step, "value": value, "series": name} for step, value in _thinned(seen)]
    if not rows:
        return
    names = list(dict.fromkeys(row["series"] for row in rows))
    cells = [(str(row["step"]), row["series"], f"{row['value']:.4g}") for row in rows]
    last = ", ".join(
        f"{name} {next(row['value'] for row in reversed(rows) if row['series'] == name):.3g}" for name in names
    )
    words = f"{title} over steps; at the end: {last}"
    yield draw.picture(title, words, draw.lines(rows, "step", names, axis), Table(("step", "series", axis), cells))


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MOST_POINTS` points: means of as many neighbours as that takes, at the last one's step."""
    width = -(-len(points) // MOST_POINTS) or 1
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def evaluations(log: Log) -> list[Evaluation]:
    """The evaluations of a log, by step and held-out set."""
    rows = []
    for row in log:
        named = [match for key in row if (match := SET.fullmatch(key))] if row["kind"] == "eval" else []
        reward, spread = _number(row, "eval_reward"), _number(row, "eval_reward_std")
        if not named or reward is None:
            continue
        took, rate = _number(row, named[0][0]), _number(row, named[0][0].replace("_runtime", "_samples_per_second"))
        samples = round(took * rate) if took and rate else 0
        half = Z * spread / math.sqrt(samples) if spread is not None and samples else 0.0
        low, high = reward - half, reward + half
        rows.append(Evaluation(row["step"], named[0][1] or "", reward, low, high, samples, took or 0.0))
    return rows


def _evaluations(log: Log) -> Iterator[Picture]:
    done = evaluations(log)
    if not done:
        return
    rows, cells = [], []
    for e in done:
        name = e.held_out or "held-out"
        rows.append({"step": e.step, "series": name, "value": e.reward, "low": e.low, "high": e.high})
        interval = f"{e.low:.3f} to {e.high:.3f}"
        cells.append((str(e.step), name, f"{e.reward:.3f}", interval, amount(e.samples), seconds(e.seconds)))
    table = Table(("step", "set", "reward", "interval at 95%", "completions", "took"), cells)
    names = list(dict.fromkeys(str(row["series"]) for row in rows))
    alt = f"Held-out reward over steps with intervals; at the end {done[-1].reward:.3g}"
    note = "Intervals take completions as independent: several of one prompt make them too narrow."
    chart = draw.lines(rows, "step", names, "mean reward", width=draw.WIDTH)
    yield draw.picture("Held-out reward", alt, chart, table, note)
