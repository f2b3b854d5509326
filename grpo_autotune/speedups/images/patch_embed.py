"""A vision tower's patch embedding as the matrix product that it is.

Qwen-VL embeds patches by a Conv3d whose kernel, stride and input are all one patch: each output is one dot product over
the patch. Convolution kernels are several times slower at this than one matrix product over all patches. The weights
are the convolution's own, so adapters, checkpointing and training see no difference.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grpo_autotune.seams.layers import INNER, AttributeSlot, Layer, Next, wrap
from grpo_autotune.seams.trainer_access import models_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import in_copies, replaced
from grpo_autotune.speedups.selfcheck import SelfCheck, autocast_dtype

CHECKED_PATCHES = 64


class PatchEmbed:
    """The speed-up."""

    name = "patch_embed"
    summary = "patches of images embedded by one matrix product instead of a Conv3d"
    stands_for = ()

    def applies(self, trainer: Any) -> str | None:
        """None where a model has such a convolution."""
        convolutions = list(_convolutions(trainer))
        if not convolutions:
            return "the model (model.name_or_path) has no Conv3d whose stride is its kernel"
        reasons = (in_copies(trainer), *(replaced(convolution, "forward") for convolution in convolutions))
        return next(filter(None, reasons), None)

    def install(self, trainer: Any) -> Installed:
        """Put a layer on each such convolution of the policy and of the reference model."""
        installed = Installed(self.name)
        for convolution in _convolutions(trainer):
            slot = AttributeSlot(convolution, "forward")
            installed.handles.append(wrap(slot, _as_product(convolution, installed), INNER))
        return installed


def _convolutions(trainer: Any) -> Iterator[nn.Conv3d]:
    for model in models_of(trainer):
        for module in model.modules():
            if isinstance(module, nn.Conv3d) and _is_embedding(module):
                yield module


def _is_embedding(convolution: nn.Conv3d) -> bool:
    return (
        convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0, 0)
        and convolution.dilation == (1, 1, 1)
        and convolution.groups == 1
    )


def _as_product(convolution: nn.Conv3d, installed: Installed) -> Layer:
    check = SelfCheck(installed)

    def product(patches: torch.Tensor) -> torch.Tensor:
        """(N, channels, t, h, w), each row a whole patch, -> (N, width, 1, 1, 1)."""
        embedded = nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
        return embedded[:, :, None, None, None]

    def embed(call_next: Next, /, patches: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        one_patch = patches.ndim == 5 and tuple(patches.shape[2:]) == convolution.kernel_size
        if installed.fell_back or not one_patch or args or kwargs:
            return call_next(patches, *args, **kwargs)
        some = patches[:CHECKED_PATCHES]
        dtype = autocast_dtype(some.device.type) or some.dtype
        if not check.run(lambda: call_next(some), lambda: product(some), dtype, "patch embeddings"):
            return call_next(patches)
        return product(patches)

    return embed
