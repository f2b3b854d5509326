"""Attention over the flat sequence in one FlexAttention kernel, with a mask of blocks of 128 tokens.

The kernel skips the blocks in which nobody looks at anybody, so that it computes what `attention` does
and a little more at the edges, in one launch a layer however many prompts there are, and without copying a prompt's
keys and values once per completion. torch has a fused kernel with a backward pass on CUDA only.
"""

import functools
import importlib
import subprocess
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from grpo_autotune.speedups.selfcheck import FAILURES
from grpo_autotune.speedups.shared_prefix.attention import FastForm, States, other_terms
from grpo_autotune.speedups.shared_prefix.layout import Layout, sent

BLOCK = 128
"""Queries and keys of a block."""

VERSIONS = 64
"""Most versions of the compiled kernel; torch's own limit is 8."""

Kernel = Callable[..., torch.Tensor]
Blocks = np.ndarray[Any, np.dtype[np.bool_]]


class Flex(FastForm):
    """As `attention.FastForm`, by `torch.nn.attention.flex_attention.flex_attention`, compiled."""

    key, name = "flex", "FlexAttention"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(timed=True)
        self._kernel = kernel

    def attend(self, states: States, layout: Layout, kwargs: dict[str, Any]) -> torch.Tensor:
        if other_terms(kwargs):
            raise NotImplementedError(f"layers with {', '.join(other_terms(kwargs))} are not supported")
        query, key, value = states
        output = self._kernel(
            query,
            key,
            value,
            block_mask=block_mask(layout, kwargs.get("sliding_window")),
            scale=kwargs.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).contiguous()

    def failures(self) -> tuple[type[BaseException], ...]:
        return _failures()


def block_mask(layout: Layout, window: int | None) -> Any:
    """Attention mask of the flat sequence as a `BlockMask`, made once per pass for all layers with this window, from
    the layout's lengths, on the host: `create_block_mask` would compute all T x T entries on the device."""
    key = ("blocks", window)
    if key not in layout.masks:
        from torch.nn.attention.flex_attention import BlockMask

        in_part, whole = (_ordered(blocks) for blocks in _blocks(layout, window))
        arrived = sent(in_part | {f"whole {name}": value for name, value in whole.items()}, layout.source.device)
        counts, indices, whole_counts, whole_indices = (tensor.int()[None, None] for tensor in arrived.values())
        layout.masks[key] = BlockMask.from_kv_blocks(
            counts,
            indices,
            whole_counts,
            whole_indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=_looks(layout, window),
            seq_lengths=(layout.tokens, layout.tokens),
        )
    return layout.masks[key]


def _ordered(blocks: Blocks) -> dict[str, torch.Tensor]:
    """Number of the key blocks that each block of queries looks at, and all key blocks, those first."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    return {"counts": torch.from_numpy(blocks.sum(1)), "indices": torch.from_numpy(order)}


def _blocks(layout: Layout, window: int | None) -> tuple[Blocks, Blocks]:
    """The key blocks (columns) that a block of queries (rows) looks at in part, and those it looks at as a whole."""
    count, far = -(-layout.tokens // BLOCK), layout.tokens if window is None else window
    touched = np.zeros((count, count), dtype=np.bool_)
    rows = np.zeros((count, count), dtype=np.int64)  # of a block of queries, those that look at a whole block of keys
    for begin, end, position, ranges in _pieces(layout):
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            first, behind = max(begin, number * BLOCK), min(end, (number + 1) * BLOCK)
            low, high = position + first - begin, position + behind - begin  # positions of these queries
            for key_begin, keys, at in ranges:
                least, most = key_begin + max(0, low - far + 1 - at), key_begin + min(keys, high - at)
                if least < most:
                    touched[number, least // BLOCK : -(-most // BLOCK)] = True
                least, most = key_begin + max(0, high - far - at), key_begin + min(keys, low + 1 - at)
                rows[number, -(-least // BLOCK) : most // BLOCK] += behind - first
    return touched & (rows < BLOCK), rows == BLOCK


def _pieces(layout: Layout) -> Iterator[tuple[int, int, int, list[tuple[int, int, int]]]]:
    """Each prompt and completion: begin, end, the position of its first token behind the prompt's first, and the keys
    that it may look at, each range with its begin, length and first position."""
    for span in layout.spans:
        prompt = (span.start, span.prompt, 0)
        yield span.start, span.prompt_end, 0, [prompt]
        for begin, length in zip(accumulate(span.lengths, initial=span.begin), span.lengths, strict=False):
            yield begin, begin + length, span.prompt, [prompt, (begin, length, span.prompt)]


def _looks(layout: Layout, window: int | None) -> Callable[..., torch.Tensor]:
    """Predicate of the mask: a token attends to those of its prompt, not ahead, and not in another completion."""
    prompt_T, owner_T, column_T = layout.prompt, layout.owner, layout.column

    def looks(batch: Any, head: Any, at: Any, to: Any) -> torch.Tensor:
        among = (owner_T[to] < 0) | (owner_T[to] == owner_T[at])
        allowed: torch.Tensor = (to <= at) & (prompt_T[to] == prompt_T[at]) & among
        return allowed if window is None else allowed & (column_T[at] - column_T[to] < window)

    return looks


@functools.cache
def compiled() -> Kernel:
    """The fused kernel, compiled when it is first called; one for the process, as its versions are kept with it."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled_for_all_shapes(flex_attention)


def compiled_for_all_shapes(kernel: Kernel, backend: str = "inductor") -> Kernel:
    """A kernel compiled with sizes left open, and with room for the versions that types, strides and windows ask for;
    as a full graph: torch would rather compute all T x T scores than compile a further version beyond its limit."""
    versions = torch.compile(kernel, fullgraph=True, dynamic=True, backend=backend)

    def attend(*states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=VERSIONS):
            return versions(*states, **kwargs)

    return attend


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    errors = (*FAILURES, AssertionError, OSError, ImportError, subprocess.SubprocessError, FailOnRecompileLimitHit)
    try:
        triton = importlib.import_module("triton.errors")
    except ImportError:
        return errors
    return (*errors, triton.TritonError)
