"""One flat sequence for a batch: each prompt once, then all completions, group by group, without any padding.

    [prompt 1 | prompt 2 | ... | completion 1.1 | completion 1.2 | ... | completion 2.1 | ...]

A completion's last token is scored, and nothing follows it, so it is not in the sequence. The prompt's last token
scores the first token of every completion of its group.

B: rows, P: prompt width, C: completion width, W = P + C, T: tokens of the flat sequence, N: scored tokens,
S: width of a group's completions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from grpo_autotune.speedups.shared_prefix.media import Media


@dataclass(frozen=True)
class Span:
    """Place of one prompt, `start..prompt_end`, and of its completions, `begin..end`, in the flat sequence."""

    start: int
    prompt_end: int
    begin: int
    lengths: list[int]  # tokens of each completion
    spread: torch.Tensor | None = None  # index of the flat token at each place of a (rows, S) rectangle; None if full
    back: torch.Tensor | None = None  # index into that rectangle of each token; None if full

    @property
    def prompt(self) -> int:
        """P."""
        return self.prompt_end - self.start

    @property
    def end(self) -> int:
        return self.begin + sum(self.lengths)

    @property
    def rows(self) -> int:
        """Completions."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """S, the longest completion; 0 where none has a token in the sequence."""
        return max(self.lengths)


@dataclass(frozen=True)
class Layout:
    """The flat sequence of one forward pass.

    A layer is computed again by gradient checkpointing, and has to find the tensors that it found before: `served`
    keeps whether the form served it, by the layer's number."""

    spans: list[Span]
    source: torch.Tensor  # which token of the (B, W) batch, counted row by row, each token of the sequence is; (T,)
    column: torch.Tensor  # its column there, (T,)
    prompt: torch.Tensor  # the number of its prompt, (T,)
    owner: torch.Tensor  # the row whose completion it belongs to, -1 in a prompt, (T,)
    scored: torch.Tensor  # the token whose next one is scored, for each completion token of the batch, row by row; (N,)
    target: torch.Tensor  # which token of the batch that next one is, (N,)
    place: torch.Tensor  # where its score goes in (rows, C), counted row by row; (N,)
    edges: torch.Tensor  # where each prompt and each completion begins in the sequence, and T
    completion_edges: torch.Tensor  # where the completions of each prompt begin behind the last prompt, and their end
    first_rows: list[int]  # for each prompt the row that stands for it
    first: torch.Tensor  # the same on the device
    form: Callable[..., torch.Tensor | None] | None = None  # of attention over it (`attention.Form`)
    served: dict[int, bool] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)  # made once for all layers, by what tells them apart

    @property
    def tokens(self) -> int:
        """T."""
        return self.spans[-1].end

    @property
    def prompts(self) -> int:
        """Tokens of all prompts, which come first."""
        return self.spans[-1].prompt_end


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

    def inside(self, row: int) -> int:
        """Tokens of a row's completion that are in the sequence."""
        return max(self.completion_lengths[row] - 1, 0)

    def tokens(self, rows: Sequence[int]) -> int:
        """Length of the flat sequence of some rows."""
        prompts = {self.groups[row]: self.prompt_lengths[row] for row in rows}
        return sum(prompts.values()) + sum(map(self.inside, rows))


def batch_of(
    input_ids_BW: torch.Tensor,
    attention_mask_BW: torch.Tensor,
    completion_width: int,
    group_B: torch.Tensor,
    given: dict[str, Any],
    known_B: torch.Tensor | None = None,
) -> Batch:
    """Read the batch; rows whose prompt or pixels differ from the rest of their group become groups of their own.

    Beside ids and mask the model is `given` inputs. Without `known_B`, what `known_of` said of these rows, their device
    is waited for; a `RuntimeError` says that the mask is another than it saw, on CUDA from the device, later."""
    if known_B is not None:
        return _known_batch(input_ids_BW, attention_mask_BW, completion_width, given, known_B)
    prompt_width = input_ids_BW.shape[1] - completion_width
    first = _first_of_group(group_B.tolist())
    prompts, masks = input_ids_BW[:, :prompt_width], attention_mask_BW[:, :prompt_width]
    same_B = (prompts == prompts[first]).all(1) & (masks == masks[first]).all(1)
    counts = torch.stack([same_B.long(), *_lengths(attention_mask_BW, prompt_width)]).tolist()
    same, prompt_lengths, completion_lengths = counts
    media = Media(given, len(first))
    groups = [
        leader if leader == row or (same[row] and media.same(row, leader)) else row for row, leader in enumerate(first)
    ]
    return Batch(input_ids_BW, attention_mask_BW, completion_width, groups, prompt_lengths, completion_lengths, media)


def known_of(batch: Batch) -> torch.Tensor | None:
    """Facts of each row, on the CPU, to be carried with the rows: the number of its prompt, its prompt's and its
    completion's tokens, and its patches, (B, 4); None where images cannot be told apart."""
    if batch.media.why_not(batch.completion_width) is not None:
        return None
    patches = [end - begin for begin, end in pairwise(batch.media.patches)]
    return torch.tensor([batch.groups, batch.prompt_lengths, batch.completion_lengths, patches]).T


def _known_batch(
    ids: torch.Tensor, mask: torch.Tensor, completion_width: int, given: dict[str, Any], known_B: torch.Tensor
) -> Batch:
    numbers, prompts, completions, patches = known_B.T.tolist()
    of_host = sent({"prompts": known_B[:, 1], "completions": known_B[:, 2]}, mask.device)
    of_mask = _lengths(mask, mask.shape[1] - completion_width)
    same = torch.stack([*of_mask]) == torch.stack([*of_host.values()])
    torch._assert_async(
        same.all(), "a mask was changed after its batch was scored: speedups must leave shared_prefix out"
    )
    media = Media(given, len(numbers), patches)
    return Batch(ids, mask, completion_width, _first_of_group(numbers), prompts, completions, media)


def _lengths(mask_BW: torch.Tensor, prompt_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each row's prompt and completion."""
    return mask_BW[:, :prompt_width].sum(1), mask_BW[:, prompt_width:].sum(1)


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
    """Lay some rows of the batch out; all that the device is told of it crosses in one copy."""
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(batch.groups[row], []).append(row)
    groups = list(by_group.values())
    spans = _spans([(batch.prompt_lengths[members[0]], [batch.inside(row) for row in members]) for members in groups])
    parts = _tokens(batch, groups, spans) | _scores(batch, rows, groups, spans)
    parts["first"] = torch.tensor([members[0] for members in groups])
    parts["edges"] = _edges([span.prompt for span in spans] + [length for span in spans for length in span.lengths])
    parts["completion_edges"] = _edges([sum(span.lengths) for span in spans])
    for number, span in enumerate(spans):
        if min(span.lengths) != span.width:
            parts[f"spread {number}"], parts[f"back {number}"] = _rectangle(span)
    arrived: dict[str, Any] = sent(parts, batch.input_ids.device)
    spans = [
        replace(span, spread=arrived.pop(f"spread {number}", None), back=arrived.pop(f"back {number}", None))
        for number, span in enumerate(spans)
    ]
    return Layout(spans, first_rows=[members[0] for members in groups], **arrived)


def _spans(sizes: list[tuple[int, list[int]]]) -> list[Span]:
    """Places for prompts of so many tokens, and their completions."""
    start, begin = 0, sum(prompt for prompt, _ in sizes)
    spans = []
    for prompt, lengths in sizes:
        spans.append(Span(start, start + prompt, begin, lengths))
        start, begin = start + prompt, spans[-1].end
    return spans


def _tokens(batch: Batch, groups: list[list[int]], spans: list[Span]) -> dict[str, torch.Tensor]:
    """Row, column, prompt and owner of each token of the sequence."""
    width = batch.prompt_width
    prompts = [(members[0], number, width - span.prompt, span.prompt)
               for number, (members, span) in enumerate(zip(groups, spans, strict=True))]  # fmt: skip
    completions = [(row, number, width, batch.inside(row)) for number, members in enumerate(groups) for row in members]
    pieces = torch.tensor(prompts + completions)
    row_T, prompt_T = pieces[:, :2].repeat_interleave(pieces[:, 3], dim=0).T
    column_T = torch.cat([torch.arange(first, first + tokens) for *_, first, tokens in prompts + completions])
    return {
        "source": row_T * batch.input_ids.shape[1] + column_T,
        "column": column_T,
        "prompt": prompt_T,
        "owner": torch.where(column_T < width, -1, row_T),
    }


def _scores(batch: Batch, rows: Sequence[int], groups: list[list[int]], spans: list[Span]) -> dict[str, torch.Tensor]:
    """Places of the scored tokens in the sequence, in the batch, and in the result."""
    before = {
        row: (span.prompt_end - 1, begin)  # last token of the prompt, first of the completion
        for members, span in zip(groups, spans, strict=True)
        for row, begin in zip(members, accumulate(span.lengths, initial=span.begin), strict=False)
    }
    scored: list[int] = []
    target: list[int] = []
    place: list[int] = []
    for number, row in enumerate(rows):
        count, (last, begin) = batch.completion_lengths[row], before[row]
        scored += [last, *range(begin, begin + count - 1)][:count]
        first = row * batch.input_ids.shape[1] + batch.prompt_width
        target += range(first, first + count)
        place += range(number * batch.completion_width, number * batch.completion_width + count)
    places = {"scored": scored, "target": target, "place": place}
    return {name: torch.tensor(numbers, dtype=torch.long) for name, numbers in places.items()}


def _edges(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([*accumulate(lengths, initial=0)])


def _rectangle(span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """`spread` and `back` of a span; what fills the gaps is never looked at: it lies in the future."""
    filled = torch.arange(span.width) < torch.tensor(span.lengths)[:, None]
    rectangle = torch.full(filled.shape, span.begin)
    rectangle[filled] = torch.arange(span.begin, span.end)
    return rectangle.flatten(), filled.flatten().nonzero()[:, 0]


def sent(parts: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of whole numbers on a device, by one copy that nothing waits for."""
    if device.type == "cpu":
        return parts
    whole = torch.cat([part.flatten() for part in parts.values()])
    whole = whole.pin_memory() if device.type == "cuda" else whole
    pieces = torch.split(whole.to(device, non_blocking=True), [part.numel() for part in parts.values()])
    return {name: piece.view(parts[name].shape) for name, piece in zip(parts, pieces, strict=True)}


def _first_of_group(groups: list[int]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(group, row) for row, group in enumerate(groups)]
