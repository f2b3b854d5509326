"""Random draws from a seed that nobody else sees, and random streams put back to where they were."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def seeded(seed: int, device: Any = None) -> Iterator[None]:
    """Draw from `seed` on the host and on a CUDA `device` inside; every random stream is where it was afterwards, those
    of other GPUs too, which `torch.manual_seed` would seed for good."""
    import torch

    on_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        with torch.cuda.device(device) if on_cuda else nullcontext():
            if on_cuda:
                torch.cuda.manual_seed(seed)
            yield


def random_streams() -> Callable[[], None]:
    """Remember the streams of Python, NumPy, torch and the current GPU; the function returned puts them back."""
    import numpy
    import torch

    at_hand: list[Any] = [(random.getstate, random.setstate), (numpy.random.get_state, numpy.random.set_state)]
    at_hand.append((torch.get_rng_state, torch.set_rng_state))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        at_hand.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    states = [(put, get()) for get, put in at_hand]

    def put_back() -> None:
        for put, state in states:
            put(state)

    return put_back
