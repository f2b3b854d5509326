"""Flash attention over segments of a packed sequence, with its log-sum-exp and its backward, on a CPU and on CUDA.

torch's own kernels, called where their log-sum-exp can be had: `scaled_dot_product_attention` keeps it to itself, and
`torch.nn.attention.varlen` lets no gradient through it. Queries and keys are packed, segment after segment; where a
segment has as many of one as of the other, attention may be causal.

T: tokens of the queries, U: of the keys, H: heads, K: heads of keys and values, D: width of a head.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query (T, H, D), key and value (U, K, D); or their gradients."""

Rest = tuple[torch.Tensor, ...]
"""The state of the random stream, of which attention without dropout takes nothing."""


class Segments(NamedTuple):
    """Queries of each segment, and the keys that they look at."""

    queries: Sequence[int]
    keys: Sequence[int]
    query_edges: torch.Tensor  # where the queries of each segment begin, and T; on the kernel's device
    key_edges: torch.Tensor  # the same of the keys
    causal: bool  # a query looks at no key behind it


class Flash(Protocol):
    """The kernels of one kind of device."""

    def serves(self, query: torch.Tensor) -> bool:
        """True for queries of a type and a width that the kernels take."""

    def forward(self, states: QKV, segments: Segments, scale: float | None) -> tuple[torch.Tensor, torch.Tensor, Rest]:
        """Output (T, H, D), log-sum-exp of each query's scores (T, H), and what `backward` wants beside."""

    def backward(
        self, gradient: torch.Tensor, states: QKV, output: torch.Tensor, sums: torch.Tensor, rest: Rest,
        segments: Segments, scale: float | None,
    ) -> QKV:  # fmt: skip
        """Gradients of the states, from that of the output, of as much of it as comes from these keys: `output` and
        `sums`, its log-sum-exp, are over these keys, and maybe others."""


class FlashCpu:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`; neighbouring segments of one size go in one call."""

    def serves(self, query: torch.Tensor) -> bool:
        return query.is_floating_point()

    def forward(self, states: QKV, segments: Segments, scale: float | None) -> tuple[torch.Tensor, torch.Tensor, Rest]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        batches = [
            attend(*_batch(states, part), 0.0, segments.causal, scale=scale)
            for part in _parts(segments)
            if part.queries
        ]
        outputs, sums = zip(*batches, strict=True)
        return _packed(outputs), _packed(sums), ()

    def backward(
        self, gradient: torch.Tensor, states: QKV, output: torch.Tensor, sums: torch.Tensor, rest: Rest,
        segments: Segments, scale: float | None,
    ) -> QKV:  # fmt: skip
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients: list[QKV] = []
        for part in _parts(segments):
            given = _batch(states, part)
            if not part.queries:
                gradients.append(
                    (given[0], torch.zeros_like(given[1]), torch.zeros_like(given[2]))
                )  # no query: no gradient
                continue
            per_query = [
                _rows(tensor, part.first_query, part.queries, part.rows) for tensor in (gradient, output, sums)
            ]
            gradients.append(back(per_query[0], *given, *per_query[1:], 0.0, segments.causal, scale=scale))
        query, key, value = (_packed(pieces) for pieces in zip(*gradients, strict=True))
        return query, key, value


class FlashCuda:
    """`aten::_flash_attention_forward` in its form for segments: one launch, however many there are."""

    def serves(self, query: torch.Tensor) -> bool:
        return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0

    def forward(self, states: QKV, segments: Segments, scale: float | None) -> tuple[torch.Tensor, torch.Tensor, Rest]:
        output, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            *states, *_edges(segments), 0.0, segments.causal, False, scale=scale
        )
        return output, sums.T, (state, unused)

    def backward(
        self, gradient: torch.Tensor, states: QKV, output: torch.Tensor, sums: torch.Tensor, rest: Rest,
        segments: Segments, scale: float | None,
    ) -> QKV:  # fmt: skip
        gradients: QKV = torch.ops.aten._flash_attention_backward(
            gradient, *states, output, sums.T.contiguous(), *_edges(segments), 0.0, segments.causal, *rest, scale=scale
        )
        return gradients


def _edges(segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return segments.query_edges, segments.key_edges, max(segments.queries), max(segments.keys)


class _Part(NamedTuple):
    """Neighbouring segments of one size: how many, where they begin, and queries and keys of each."""

    rows: int
    first_query: int
    first_key: int
    queries: int
    keys: int


def _parts(segments: Segments) -> Iterator[_Part]:
    first_query = first_key = 0
    for (queries, keys), same in groupby(zip(segments.queries, segments.keys, strict=True)):
        rows = len(list(same))
        yield _Part(rows, first_query, first_key, queries, keys)
        first_query, first_key = first_query + rows * queries, first_key + rows * keys


def _batch(states: QKV, part: _Part) -> QKV:
    query, key, value = states
    return (
        _rows(query, part.first_query, part.queries, part.rows),
        _rows(key, part.first_key, part.keys, part.rows),
        _rows(value, part.first_key, part.keys, part.rows),
    )


def _rows(packed: torch.Tensor, first: int, length: int, rows: int) -> torch.Tensor:
    """Segments of one length out of (T, H, ...) as a batch (rows, H, length, ...), without a copy."""
    part = packed[first : first + rows * length]
    return part.view(rows, length, *packed.shape[1:]).transpose(1, 2)


def _packed(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of `_rows` for all parts, in their order."""
    pieces = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
