"""Attention over the flat sequence in one FlexAttention kernel, with a mask of blocks of 128 tokens.

The kernel skips the blocks in which nobody looks at anybody, so that it computes what `attention` does
and a little more at the edges, in one launch a layer however many prompts there are, and without copying a prompt's
keys and values once per completion. torch has a fused kernel with a backward pass on CUDA only.
"""

from __future__ import annotations

import functools
import importlib
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.speedups.selfcheck import FAILURES, first_line
from grpo_autotune.speedups.shared_prefix.attention import Attention, States
from grpo_autotune.speedups.shared_prefix.layout import Layout

OTHER_TERMS = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change scores: layers that give one are not supported."""

_logger = logging.getLogger("grpo_autotune.speedups")

Kernel = Callable[..., torch.Tensor]


class Flex:
    """As `attention.Form`.

    Args:
        kernel: `torch.nn.attention.flex_attention.flex_attention`, compiled.

    Attributes:
        failed: Why the work is left to the other form, for good.
    """

    name = "FlexAttention"

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.failed: str | None = None

    def __call__(
        self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """As `Form`."""
        if self.failed is not None:
            return None
        try:
            return self._attend(states, layout, kwargs)
        except failures() as error:
            if is_of_the_machine(error):
                raise
            self.give_up(f"{type(error).__name__}: {first_line(error)}")
            return None

    def give_up(self, reason: str) -> None:
        """Leave the work to the other form from now on, and say so once."""
        if self.failed is None:
            self.failed = reason
            _logger.warning("shared_prefix goes on without %s: %s", self.name, reason)

    def _attend(self, states: States, layout: Layout, kwargs: dict[str, Any]) -> torch.Tensor:
        other = [name for name in OTHER_TERMS if kwargs.get(name) is not None]
        if other:
            raise NotImplementedError(f"layers with {', '.join(other)} are not supported")
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


def block_mask(layout: Layout, window: int | None) -> Any:
    """Attention mask of the flat sequence as a `BlockMask`; made once per pass for all layers with this window."""
    key = ("blocks", window)
    if key not in layout.masks:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens, device = layout.tokens, str(layout.source.device)
        layout.masks[key] = create_block_mask(_looks(layout, window), None, None, tokens, tokens, device=device)
    return layout.masks[key]


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
    """The fused kernel, compiled when it is first called; one for the process, as its versions are kept with it.

    As a full graph: torch would rather compute all T x T scores than compile a further version beyond its limit.
    """
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Kernel = torch.compile(flex_attention, fullgraph=True)
    return kernel


@functools.cache
def failures() -> tuple[type[BaseException], ...]:
    """Errors that compiling or starting a kernel raises where it is not available."""
    errors: tuple[type[BaseException], ...] = (
        *FAILURES,
        AssertionError,
        OSError,
        ImportError,
        subprocess.SubprocessError,
    )
    try:
        triton = importlib.import_module("triton.errors")
    except ImportError:
        return errors
    return (*errors, triton.TritonError)
