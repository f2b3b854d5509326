"""The summary of completions as text for a terminal."""

from rich.console import RenderableType
from rich.text import Text

from grpo_autotune.records.inference import Inference, Score
from grpo_autotune.render.text import as_text, table_of
from grpo_autotune.units import amount, percent


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
