"""Random draws from a seed that nobody else sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def seeded(seed: int, device: Any = None) -> Iterator[None]:
    """Draw from `seed` on the host and on a CUDA `device` inside; every random stream is where it was afterwards.

    `torch.manual_seed` would seed those of all GPUs, for good.
    """
    import torch

    on_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        with torch.cuda.device(device) if on_cuda else nullcontext():
            if on_cuda:
                torch.cuda.manual_seed(seed)
            yield
