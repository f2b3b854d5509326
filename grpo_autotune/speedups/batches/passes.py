"""Passes of an accumulation: which neighbouring micro batches go through the model together, and at how many tokens.

What a pass keeps for its backward pass is in proportion to its tokens (`estimate.memory`), so the budget is the tokens
of the micro batch that TRL would send: memory stays at most what the configuration needs without any speed-up. Shared
prompts, rows left out and padding cut off make room in it.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One row of a log-prob pass: the number of its prompt, and tokens without padding."""

    group: int
    prompt: float
    completion: float


class Part(NamedTuple):
    """Rows of one micro batch; only parts of one `kind` (the same inputs) can go together."""

    kind: Hashable
    rows: Sequence[Row]


def tokens_of(rows: Iterable[Row], *, shared: bool) -> float:
    """Tokens that a pass forwards: each prompt once where prompts are shared, else every row padded to the longest."""
    rows = list(rows)
    if shared:
        prompts = {row.group: row.prompt for row in rows}
        return sum(prompts.values()) + sum(max(row.completion - 1, 0.0) for row in rows)
    return len(rows) * (max(row.prompt for row in rows) + max(row.completion for row in rows))


def planned(parts: Sequence[Part], most: float, *, shared: bool, by_launches: bool) -> list[list[int]]:
    """Indices of the parts of each pass, neighbours together where that pays and fits into `most` tokens, which one
    part alone may exceed. Where passes cost by their kernel launches (CUDA) fewer pay at equal tokens; elsewhere tokens
    cost, and two parts go together where that saves some."""
    passes: list[list[int]] = []
    for index, part in enumerate(parts):
        rows = [row for before in passes[-1] for row in parts[before].rows] if passes else []
        together = tokens_of([*rows, *part.rows], shared=shared)
        apart = tokens_of(rows, shared=shared) + tokens_of(part.rows, shared=shared) if rows else 0.0
        same = bool(rows) and parts[passes[-1][0]].kind == part.kind
        if same and together <= most and (by_launches or together < apart):
            passes[-1].append(index)
        else:
            passes.append([index])
    return passes
