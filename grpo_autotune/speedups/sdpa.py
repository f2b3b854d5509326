"""The backend of scaled-dot-product attention around calls whose shapes are new again and again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep attention off cuDNN, which plans for tens of milliseconds at each new shape; the other backends do not.
    Where a user has switched all others off, cuDNN stays."""
    flags: Any = torch.backends.cuda
    others = flags.flash_sdp_enabled() or flags.mem_efficient_sdp_enabled() or flags.math_sdp_enabled()
    before = flags.cudnn_sdp_enabled()
    flags.enable_cudnn_sdp(before and not others)
    try:
        yield
    finally:
        flags.enable_cudnn_sdp(before)
