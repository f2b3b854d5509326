"""RMS norms as the one kernel that PyTorch has for them; transformers writes them as six to eight."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo_autotune.speedups.conditions import replaced
from grpo_autotune.speedups.generation.weights import is_compiled


@contextmanager
def one_kernel_norms(model: Any) -> Iterator[None]:
    """Inside it, norms of the kind `weight * x / sqrt(mean(x^2) + eps)` are one call of `rms_norm`, but in a compiled
    model. The sum is taken in float32 as there; in bfloat16 the result is rounded once in place of twice."""
    norms = [] if is_compiled(model) else [module for module in model.get_decoder().modules() if _is_such(module)]
    try:
        for norm in norms:
            norm.forward = partial(_normed, norm, norm.forward)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)


def _is_such(module: nn.Module) -> bool:
    """True for the class that most models copy from Llama; a forward that somebody replaced is left alone."""
    copied = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    untouched = "forward" not in vars(module) and replaced(module, "forward") is None
    return copied and untouched and getattr(module, "weight", None) is not None


def _normed(norm: Any, forward: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or states.dtype != norm.weight.dtype:
        return forward(states, *args, **kwargs)
    return nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
