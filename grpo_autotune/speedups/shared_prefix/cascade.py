"""Attention over the flat sequence in two calls of flash attention, merged by their log-sum-exp.

The first call has each prompt and each completion look at itself, the second all completions of a prompt at the prompt.
A token's output over both sets of keys is the mean of its two outputs, weighted by the share that each has of
the sum of exponentials. The backward of flash attention needs the output, that sum and the gradient, all of which may
be those over all keys, so the gradients of both calls add up to the whole (as in *Cascade Inference*, FlashInfer, 2024,
and *Ring Attention*, arXiv 2310.01889). No prompt's key is copied, there is no mask, and beside the states nothing but
the output and the sums is kept for the backward pass.

T: tokens of the flat sequence, the first P of them prompts; H: heads, K: heads of keys and values, D: width of a head.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from grpo_autotune.speedups.selfcheck import autocast_dtype
from grpo_autotune.speedups.shared_prefix.attention import FastForm, States, other_terms
from grpo_autotune.speedups.shared_prefix.layout import Layout
from grpo_autotune.speedups.shared_prefix.varlen import Flash, Segments


class Cascade(FastForm):
    """As `attention.FastForm`, by the kernels of the device."""

    key, name = "cascade", "the cascade form"

    def __init__(self, flash: Flash, timed: bool) -> None:
        super().__init__(timed)
        self._flash = flash

    def attend(self, states: States, layout: Layout, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """As `FastForm`; None where a layer changes scores, drops some, or does not see the whole text."""
        window = kwargs.get("sliding_window")
        longest = max(span.prompt + span.width for span in layout.spans)
        if other_terms(kwargs) or kwargs.get("dropout") or (window is not None and window < longest):
            return None
        query, key, value = (_as_under_autocast(state)[0].transpose(0, 1) for state in states)
        if query.dtype != key.dtype or value.shape != key.shape or not self._flash.serves(query):
            return None
        plan = Plan(self._flash, *_segments(layout), layout.prompts, kwargs.get("scaling"))
        output: torch.Tensor = _Merged.apply(query, key, value, plan)  # type: ignore[no-untyped-call]
        return output[None]


class Plan(NamedTuple):
    """Arguments of the kernels beside states, for one pass."""

    flash: Flash
    alone: Segments
    prompt: Segments
    prompts: int
    scale: float | None


def _segments(layout: Layout) -> tuple[Segments, Segments]:
    """Each prompt and completion against itself, and the completions of each prompt against it; made once a pass."""
    if "segments" not in layout.masks:
        prompts = [span.prompt for span in layout.spans]
        pieces = prompts + [length for span in layout.spans for length in span.lengths]
        edges, completion_edges = layout.edges.int(), layout.completion_edges.int()
        layout.masks["segments"] = (
            Segments(pieces, pieces, edges, edges, True),
            Segments(
                [sum(span.lengths) for span in layout.spans],
                prompts,
                completion_edges,
                edges[: len(prompts) + 1],
                False,
            ),
        )
    segments: tuple[Segments, Segments] = layout.masks["segments"]
    return segments


def _as_under_autocast(state: torch.Tensor) -> torch.Tensor:
    """In the type that autocast has scaled-dot-product attention take."""
    return state if state.dtype == torch.float64 else state.to(autocast_dtype(state.device.type) or state.dtype)


class _Merged(torch.autograd.Function):
    """Both calls, and their merged output (T, H, D)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> torch.Tensor:
        first = plan.prompts
        output, sums, rest = plan.flash.forward((query, key, value), plan.alone, plan.scale)
        prompt_rest: tuple[torch.Tensor, ...] = ()
        if len(query) > first:
            states = query[first:], key[:first], value[:first]
            other, other_sums, prompt_rest = plan.flash.forward(states, plan.prompt, plan.scale)
            _merge(output[first:], sums[first:], other, other_sums)
        ctx.save_for_backward(query, key, value, output, sums, *rest, *prompt_rest)
        ctx.plan, ctx.rest = plan, len(rest)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, sums, *rests = ctx.saved_tensors
        plan, first, gradient = ctx.plan, ctx.plan.prompts, gradient.contiguous()
        rest, prompt_rest = rests[: ctx.rest], rests[ctx.rest :]
        gradients = plan.flash.backward(gradient, (query, key, value), output, sums, rest, plan.alone, plan.scale)
        if len(query) > first:
            states = query[first:], key[:first], value[:first]
            of_completions = gradient[first:], states, output[first:], sums[first:]
            more = plan.flash.backward(*of_completions, prompt_rest, plan.prompt, plan.scale)
            for whole, part in zip(
                (gradients[0][first:], gradients[1][:first], gradients[2][:first]), more, strict=True
            ):
                whole += part
        return *gradients, None


def _merge(output: torch.Tensor, sums: torch.Tensor, other: torch.Tensor, other_sums: torch.Tensor) -> None:
    """Make output and log-sum-exp over some keys those over these and others."""
    share = torch.sigmoid(other_sums - sums)[..., None]  # of the other keys
    output.copy_(torch.lerp(output.to(share.dtype), other.to(share.dtype), share))
    sums.copy_(torch.logaddexp(sums, other_sums))
