"""Trained weights as text for a terminal: completions, the receipt of a merge, ranked checkpoints."""

import shutil
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_autotune.records.evaluation_lines import COLUMNS
from grpo_autotune.records.evaluations import CheckpointList, SavedRow
from grpo_autotune.records.trained import Difference, Inference, Merged, Score
from grpo_autotune.render.text import as_text, table_of
from grpo_autotune.units import amount, percent, plural, size


def render_inference(inference: Inference, width: int = 100) -> str:
    """The summary as text for a terminal of `width` columns."""
    settings, rate = inference.settings, inference.tokens_per_s
    sampled = ", ".join(f"{name} {value}" for name, value in settings.sampling.items() if value is not None)
    speed = "nothing was left to do" if rate is None else f"{inference.written} written, {amount(rate)} tokens/s"
    lines = [
        f"{inference.completions} completions of {inference.prompts} prompts: {speed}",
        f"{amount(inference.tokens)} tokens each, {percent(inference.truncated)} truncated",
        f"weights: {settings.checkpoint}, by {settings.backend}",
        f"data: {settings.data}",
        f"sampling: {'greedy' if settings.greedy else sampled}",
        f"file: {inference.out}",
    ]
    counts = ("prompts", "completions", "failed", "truncated")
    table = table_of("reward", "branch", "mean", "interval", *counts, right=counts)
    for score in inference.scores:
        table.add_row(*_cells(score))
    meaning = f"Interval of the mean at {percent(inference.confidence)}, over prompts."
    below: list[RenderableType] = [table, Text(meaning)] if inference.scores else []
    return as_text([*map(Text, lines), *below], width, colour=False)


def _cells(score: Score) -> list[str]:
    mean = "-" if score.mean is None else f"{score.mean:.4f}"
    ends = "-" if score.low is None or score.high is None else f"{score.low:.4f} to {score.high:.4f}"
    counts = (score.prompts, score.completions, score.failed)
    branch = "all" if score.branch is None else score.branch
    return [score.reward, branch, mean, ends, *map(str, counts), percent(score.truncated)]


def render_merged(merged: Merged, out: str) -> str:
    """A line each for what was merged, the two differences that prove it, and what to know about it."""
    proof = merged.proof
    lines = [
        f"{merged.trained} merged into {merged.base}" if merged.base else f"{merged.trained} copied",
        f"  merged and trained model   {_nats(proof.merged)}   at most {proof.limit:g}",
        f"  base and trained model     {_nats(proof.base)}   on average at least {proof.factor:g} times as far"
        if proof.base
        else "  base                       not known: a full fine-tune outside of its run",
        f"  |difference of log-probs| over {plural(proof.tokens, 'token')} of {proof.prompts} and greedy answers, "
        f"computed in {proof.dtype}",
        *(f"  {note}" for note in merged.notes),
        f"Saved: {out} ({merged.dtype}, embeddings {'' if merged.tied else 'not '}tied); receipt: {out}/merged.json",
    ]
    return "\n".join(lines)


def _nats(difference: Difference) -> str:
    return f"mean {difference.mean:<8.2g} max {difference.max:<8.2g} nats"


MOST_ROWS = 10
"""Checkpoints that are listed without `--show-all`."""
MEASURED = {"held-out reward": "eval_reward", "val loss": "eval_loss", "KL": "eval_kl"}
"""Columns that are shown where they fit -> the names in the log."""


def render_checkpoints(listed: CheckpointList, *, show_all: bool = False, width: int | None = None) -> str:
    """The list, the best at the top, and why it is the best."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    return as_text(_parts(listed, width, show_all), width, colour=False)


def _parts(listed: CheckpointList, width: int, show_all: bool) -> Iterator[RenderableType]:
    shown = listed.rows if show_all else listed.rows[:MOST_ROWS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns: dict[str, list[str]] = {
        "": [str(row.place or "") for row in shown],
        "checkpoint": [row.name for row in shown],
        "also": [", ".join(row.links) for row in shown],
        "epoch": ["" if row.epoch is None else f"{row.epoch:.4g}" for row in shown],
        "state": [row.state for row in shown],
        "on disk": ["" if row.bytes is None else size(row.bytes) for row in shown],
    }
    if listed.metric not in (None, "eval_reward"):
        columns[str(listed.metric)] = ["" if row.value is None else f"{row.value:.4g}" for row in shown]
    for title, key in MEASURED.items():
        cells = [_cell(row, title) for row in shown]
        if key != listed.metric or key == "eval_reward":
            columns |= {title: cells} if _width({**columns, title: cells}) <= width and any(cells) else {}
    for title in columns:
        table.add_column(title, justify="left" if title in ("checkpoint", "also", "state") else "right", no_wrap=True)
    for place in range(len(shown)):
        table.add_row(*(cells[place] for cells in columns.values()))
    yield table
    if len(listed.rows) > len(shown):
        yield Text(f"and {plural(len(listed.rows) - len(shown), 'other')}: --show-all lists them")
    if listed.best is not None:
        yield Text(f"Best by {listed.strategy}: {listed.best}. Its {listed.why}.")
    else:
        yield Text(f"No best: {listed.why}.")
    for note in listed.notes:
        yield Text(f"Note: {note}.")
    for row in shown:
        if row.state == "torn":
            yield Text(f"{row.name} is torn: {row.flaw}.")


def _cell(row: SavedRow, title: str) -> str:
    return "" if row.evaluation is None else COLUMNS[title][2](row.evaluation)


def _width(columns: dict[str, list[str]]) -> int:
    """Columns of text of a table, with its gaps."""
    return sum(max(map(len, [title, *cells])) + 2 for title, cells in columns.items())
