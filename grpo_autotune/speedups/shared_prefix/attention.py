"""Attention over a flat sequence in which several completions follow one prompt.

The sequence goes through the model as one row, so that every projection, norm and gradient-checkpointed layer sees each
prompt once. Only attention has to know who may look at whom: a prompt at itself, a completion at its prompt and itself.
The attention function that the model is configured with does the work, on the prompt as one row, and on the completions
as a batch whose keys are the prompt's followed by their own. No token is computed for a mask to throw away, unlike with
one mask over the whole sequence, (P + G C)^2 against P^2 + G C (P + C).

T: tokens of the flat sequence, S: width of a group's completions, P: its prompt's length, H: heads, D: width of a head.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.seams.layers import INNER, Handle, ItemSlot, wrap
from grpo_autotune.speedups.base import kernel_name
from grpo_autotune.speedups.sdpa import without_cudnn
from grpo_autotune.speedups.selfcheck import FAILURES, first_line
from grpo_autotune.speedups.shared_prefix.layout import Layout, Span

ARGUMENT = "shared_prefix"
"""Keyword that carries the layout through the model: gradient checkpointing computes a layer again in the backward
pass, when nothing but the layer's own arguments is left to tell."""

_logger = logging.getLogger("grpo_autotune.speedups")

Attention = Callable[..., tuple[torch.Tensor, Any]]

States = tuple[torch.Tensor, ...]
"""Query, key and value."""


class Form(Protocol):
    """One way to compute attention over a flat sequence."""

    def __call__(
        self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """The output (1, T, H, D) for query, key and value (1, H, T, D), the latter two maybe of fewer heads, of a
        layer that calls the function that the model is configured with; None leaves the layer to `Split`."""


OTHER_TERMS = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change scores."""


def other_terms(kwargs: dict[str, Any]) -> list[str]:
    """Those of `OTHER_TERMS` that a layer gives."""
    return [name for name in OTHER_TERMS if kwargs.get(name) is not None]


class FastForm:
    """As `Form`: one that takes the place of `Split` until it fails."""

    key = name = ""  # what the option `form` calls it, and what messages do

    def __init__(self, timed: bool) -> None:
        self.timed = timed  # has to be measured as faster before a pass takes it
        self.failed: str | None = None  # why the work is left to `Split`, for good

    def __call__(
        self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """As `Form`; a layer that is computed again gets what it got the first time. Raises what it failed by where
        gradient checkpointing keeps what it left for the backward pass, memory ran out, or the GPU failed."""
        layer = int(getattr(module, "layer_idx", -1))
        served = layout.served.get(layer)
        if served is False or (served is None and self.failed is not None):
            return None
        try:
            output = self.attend(states, layout, kwargs)
        except self.failures() as error:
            if served or is_of_the_machine(error):
                raise
            self.give_up(f"{type(error).__name__}: {first_line(error)}")
            output = None
        if torch.is_grad_enabled():  # a re-entrant checkpoint's first call keeps nothing
            layout.served[layer] = output is not None
        return output

    def attend(self, states: States, layout: Layout, kwargs: dict[str, Any]) -> torch.Tensor | None:
        raise NotImplementedError

    def failures(self) -> tuple[type[BaseException], ...]:
        """Errors that it raises where it is not available."""
        return FAILURES

    def give_up(self, reason: str) -> None:
        """Leave the work to `Split` from now on, and say so once."""
        if self.failed is None:
            self.failed = reason
            _logger.warning("shared_prefix goes on without %s: %s", self.name, reason)


_handles: dict[str, Handle] = {}
_users: Counter[str] = Counter()


class AttentionLayer:
    """The layer on the attention function called `implementation`, which acts where it is given a layout.

    The function is transformers' own: a layer for each trainer would pile up where many are built in a process, so
    there is one for all, which goes with its last user, removed or forgotten."""

    def __init__(self, implementation: str) -> None:
        from transformers import AttentionInterface

        if not _users[implementation]:
            slot = ItemSlot(AttentionInterface._global_mapping, implementation)
            _handles[implementation] = wrap(slot, _layer(implementation), INNER)
        _users[implementation] += 1
        self._leave = weakref.finalize(self, _leave, implementation)

    def remove(self) -> None:
        self._leave()


def _leave(implementation: str) -> None:
    _users[implementation] -= 1
    if not _users[implementation]:
        _handles.pop(implementation).remove()


def _layer(implementation: str) -> Callable[..., Any]:
    split = Split(implementation)

    def attention(
        call_next: Attention, /, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        layout = kwargs.pop(ARGUMENT, None)
        # a vision tower gets the keyword too, and attends both ways
        if layout is None or not (getattr(module, "is_causal", False) and hasattr(module, "layer_idx")):
            return call_next(module, query, key, value, attention_mask, **kwargs)
        kwargs.pop("position_ids", None)  # flash kernels would look for packed sequences in them
        given = (call_next, module, (query, key, value), layout, kwargs)
        output = None if layout.form is None else layout.form(*given)
        return split(*given) if output is None else output, None

    return attention


class Split:
    """The form that is there always: each prompt as one row, and its completions as a batch; flash kernels, which the
    function's name tells, take no masks."""

    def __init__(self, implementation: str) -> None:
        self._masked = not kernel_name(implementation).startswith("flash")

    def __call__(
        self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        with without_cudnn():  # each span has a shape of its own
            return self._attend(attention, module, states, layout, kwargs)

    def _attend(
        self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        window = kwargs.get("sliding_window")
        prompts, completions = [], []
        for span in layout.spans:
            query, key, value = (state[:, :, span.start : span.prompt_end] for state in states)
            mask = self._mask(layout, 0, span.prompt, window) if window is not None and span.prompt > window else None
            prompts.append(attention(module, query, key, value, mask, **kwargs)[0])
            if not span.width:
                continue
            query, key, value = (_as_batch(state, span) for state in states)
            key, value = (
                torch.cat([state[:, :, span.start : span.prompt_end].expand(span.rows, -1, -1, -1), behind], dim=2)
                for state, behind in ((states[1], key), (states[2], value))
            )
            mask = self._mask(layout, span.prompt, span.width, window)
            output = attention(module, query, key, value, mask, **kwargs)[0].flatten(0, 1)  # (G S, H, D)
            completions.append((output if span.back is None else output[span.back])[None])
        return torch.cat([*prompts, *completions], dim=1)

    def _mask(self, layout: Layout, before: int, width: int, window: int | None) -> torch.Tensor | None:
        if not self._masked:
            return None
        key = (before, width, window)
        if key not in layout.masks:
            layout.masks[key] = causal_mask(before, width, window, layout.source.device)
        mask: torch.Tensor = layout.masks[key]
        return mask


def _as_batch(state: torch.Tensor, span: Span) -> torch.Tensor:
    """The completions' part of (1, H, T, D) as (rows, H, S, D)."""
    states_HTD = state[0, :, span.begin : span.end] if span.spread is None else state[0].index_select(1, span.spread)
    return states_HTD.view(states_HTD.shape[0], span.rows, span.width, -1).transpose(0, 1)


def causal_mask(before: int, width: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Causal mask of `width` tokens S after `before` others, (1, 1, S, before + S); true where a token attends."""
    at = torch.arange(before, before + width, device=device)[:, None]
    to = torch.arange(before + width, device=device)
    looks = to <= at
    return (looks if window is None else looks & (to > at - window))[None, None]
