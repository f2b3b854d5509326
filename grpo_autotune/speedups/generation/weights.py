"""Weights of linear layers replaced while completions are written; the parameters themselves are put back."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grpo_autotune.seams.layers import take_off
from grpo_autotune.speedups.selfcheck import autocast_dtype

Replacement = tuple[nn.Linear, torch.Tensor]

WIDE = 64
"""Width from which a weight is laid out anew: the factors of an adapter are not."""


@contextmanager
def replaced(weights: Iterable[Replacement]) -> Iterator[None]:
    """Inside it, each layer multiplies by the given tensor; afterwards it has the very parameter that it had, which a
    layer that is tied to it keeps."""
    before: list[tuple[nn.Linear, nn.Parameter | None]] = []
    try:
        for linear, weight in weights:
            before.append((linear, linear._parameters["weight"]))
            linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for linear, parameter in reversed(before):
            linear._parameters["weight"] = parameter


def is_compiled(model: Any) -> bool:
    """True for a model in which other weights, norms or hooks are other guards: a compilation for each generation."""
    return getattr(model, "_compiled_call_impl", None) is not None


@contextmanager
def products(model: Any) -> Iterator[dict[nn.Linear, torch.dtype | None]]:
    """Note, while the model runs inside it, in which type autocast multiplies for each linear layer of the text model,
    None where it is off. Layers that are not called are absent, and all of a compiled model."""
    dtypes: dict[nn.Linear, torch.dtype | None] = {}

    def look(linear: nn.Linear, inputs: Any) -> None:
        dtypes[linear] = autocast_dtype(linear.weight.device.type)

    text = [] if is_compiled(model) else [*model.get_decoder().modules(), model.get_output_embeddings()]
    handles = [module.register_forward_pre_hook(look) for module in text if type(module) is nn.Linear]
    try:
        yield dtypes
    finally:
        take_off(handles)


def for_decoding(model: Any, dtypes: Mapping[nn.Linear, torch.dtype | None]) -> Iterator[Replacement]:
    """Weights of these layers (`products`) in the form in which single tokens are multiplied fastest.

    Under autocast they are cast once in place of once per token, to the same numbers. On a CPU, in float32, they lie by
    column: with 8 rows the product takes about half the time, with 4 or 32 about three quarters."""
    for linear, dtype in dtypes.items():
        if type(linear.weight) is not nn.Parameter:
            continue
        weight = linear.weight.detach().to(dtype or linear.weight.dtype)
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape) >= WIDE:
            weight = weight.t().contiguous().t()
        if weight.data_ptr() != linear.weight.data_ptr():
            yield linear, weight
