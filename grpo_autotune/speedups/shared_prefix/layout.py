"""One flat sequence for a batch: each prompt once, then the completions that follow it, without any padding.

    [prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...]

A completion's last token is scored, and nothing follows it, so it is not in the sequence. The prompt's last token
scores the first token of every completion of its group.

B: rows, P: prompt width, C: completion width, W = P + C, T: tokens of the flat sequence, N: scored tokens,
S: width of a group's completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_autotune.speedups.shared_prefix.media import Media


@dataclass(frozen=True)
class Span:
    """Place of one prompt and its completions in the flat sequence: `start..prompt_end..end`.

    Attributes:
        rows: Completions.
        width: S, the longest completion; 0 where none has a token in the sequence.
        spread: Index of the flat token at each place of a (rows, S) rectangle; None where the rectangle is full.
        back: Index into that rectangle of each token; None where it is full.
    """

    start: int
    prompt_end: int
    end: int
    rows: int
    width: int
    spread: torch.Tensor | None
    back: torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """The flat sequence of one forward pass.

    Attributes:
        source: Which token of the (B, W) batch, counted row by row, each token of the sequence is; (T,).
        column: Its column there, (T,).
        prompt: The number of its prompt, (T,).
        owner: The row whose completion it belongs to, -1 in a prompt, (T,).
        scored: The token whose next one is scored, for each completion token of the batch, row by row; (N,).
        first_rows: For each prompt the row that stands for it.
        form: How attention is computed over it (`attention.Form`).
        masks: Attention masks by what tells them apart, kept for all layers of the model.
    """

    spans: list[Span]
    source: torch.Tensor
    column: torch.Tensor
    prompt: torch.Tensor
    owner: torch.Tensor
    scored: torch.Tensor
    first_rows: list[int]
    form: Callable[..., torch.Tensor | None] | None = None
    masks: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """T."""
        return self.spans[-1].end


@dataclass(frozen=True)
class Batch:
    """Rows to be scored: ids and mask (B, W); rows of one number in `groups` share a prompt."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_width: int
    groups: list[int]
    prompt_lengths: list[int]
    completion_lengths: list[int]
    media: Media

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.completion_width

    def tokens(self, rows: Sequence[int]) -> int:
        """Length of the flat sequence of some rows."""
        prompts = {self.groups[row]: self.prompt_lengths[row] for row in rows}
        return sum(prompts.values()) + sum(max(self.completion_lengths[row] - 1, 0) for row in rows)


def batch_of(
    input_ids_BW: torch.Tensor,
    attention_mask_BW: torch.Tensor,
    completion_width: int,
    group_B: torch.Tensor,
    given: dict[str, Any],
) -> Batch:
    """Read the batch; rows whose prompt or pixels differ from the rest of their group become groups of their own."""
    prompt_width = input_ids_BW.shape[1] - completion_width
    first = _first_of_group(group_B.tolist())
    prompts, masks = input_ids_BW[:, :prompt_width], attention_mask_BW[:, :prompt_width]
    same_B = (prompts == prompts[first]).all(1) & (masks == masks[first]).all(1)
    counts = torch.stack([same_B.long(), masks.sum(1), attention_mask_BW[:, prompt_width:].sum(1)]).tolist()
    same, prompt_lengths, completion_lengths = counts
    media = Media(given, len(first))
    groups = [
        leader if leader == row or (same[row] and media.same(row, leader)) else row for row, leader in enumerate(first)
    ]
    return Batch(input_ids_BW, attention_mask_BW, completion_width, groups, prompt_lengths, completion_lengths, media)


def chunks(batch: Batch, limit: int) -> Iterator[list[int]]:
    """Rows in order, in chunks of at most `limit` flat tokens (at least one row each)."""
    chunk: list[int] = []
    for row in range(len(batch.groups)):
        if chunk and batch.tokens([*chunk, row]) > limit:
            yield chunk
            chunk = []
        chunk.append(row)
    yield chunk


def layout_of(batch: Batch, rows: Sequence[int]) -> Layout:
    """Lay some rows of the batch out."""
    width, prompt_width = batch.input_ids.shape[1], batch.prompt_width
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(batch.groups[row], []).append(row)
    spans: list[Span] = []
    columns: list[torch.Tensor] = []
    origins: list[tuple[int, int, int]] = []  # (row, its prompt's number, tokens)
    before: dict[int, tuple[int, int]] = {}  # row -> (last token of the prompt, first of the completion)
    at = 0
    for number, members in enumerate(by_group.values()):
        length = batch.prompt_lengths[members[0]]
        start, at = at, at + length
        columns.append(torch.arange(prompt_width - length, prompt_width))
        origins.append((members[0], number, length))
        lengths = [max(batch.completion_lengths[row] - 1, 0) for row in members]
        prompt_end = at
        for row, inside in zip(members, lengths, strict=True):
            before[row] = (prompt_end - 1, at)
            columns.append(torch.arange(prompt_width, prompt_width + inside))
            origins.append((row, number, inside))
            at += inside
        spans.append(_span(start, prompt_end, lengths, batch.input_ids.device))
    row_T, prompt_T = (
        torch.repeat_interleave(
            torch.tensor([origin[part] for origin in origins]), torch.tensor([origin[2] for origin in origins])
        )
        for part in (0, 1)
    )
    column_T, device = torch.cat(columns), batch.input_ids.device
    return Layout(
        spans=spans,
        source=(row_T * width + column_T).to(device),
        column=column_T.to(device),
        prompt=prompt_T.to(device),
        owner=torch.where(column_T < prompt_width, -1, row_T).to(device),
        scored=_scored(batch, rows, before).to(device),
        first_rows=[members[0] for members in by_group.values()],
    )


def _span(start: int, prompt_end: int, lengths: list[int], device: torch.device) -> Span:
    width, end = max(lengths), prompt_end + sum(lengths)
    spread = back = None
    if min(lengths) != width:
        filled = torch.arange(width) < torch.tensor(lengths)[:, None]
        rectangle = torch.full(
            filled.shape, prompt_end
        )  # what fills the gaps is never looked at: it lies in the future
        rectangle[filled] = torch.arange(prompt_end, end)
        spread, back = rectangle.flatten().to(device), filled.flatten().nonzero()[:, 0].to(device)
    return Span(start, prompt_end, end, len(lengths), width, spread, back)


def _scored(batch: Batch, rows: Sequence[int], before: dict[int, tuple[int, int]]) -> torch.Tensor:
    pieces = []
    for row in rows:
        last, first = before[row]
        if batch.completion_lengths[row]:
            pieces += [torch.tensor([last]), torch.arange(first, first + batch.completion_lengths[row] - 1)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)


def _first_of_group(groups: list[int]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(group, row) for row, group in enumerate(groups)]
