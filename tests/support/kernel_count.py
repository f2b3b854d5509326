"""Counts of what PyTorch runs: kernels, and points where the host waits for a number of the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = ("aten::empty", "aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class KernelCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, operators are counted by name; views and allocations start no kernel and are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()
        self.inside_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not self.inside_one and not func.is_view and not name.startswith(NO_KERNEL):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return sum(count for name, count in self.by_name.items() if name not in WAITS)

    @property
    def waits(self) -> int:
        return sum(self.by_name[name] for name in WAITS)


class OneKernel(TorchFunctionMode):
    """Counts `rms_norm` as the one kernel that it is on CUDA (`_fused_rms_norm`); other devices run it in parts."""

    def __init__(self, count: KernelCount) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one = func in (torch.nn.functional.rms_norm, torch.rms_norm)
        self.count.by_name["aten::_fused_rms_norm"] += one
        self.count.inside_one = one
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.count.inside_one = False


def per_token(run: Any, few: int = 8, more: int = 24) -> tuple[float, float]:
    """Kernels and waits of one more token: `run(tokens)` is called with two numbers of them."""
    found = []
    for tokens in (few, more):
        with torch.no_grad(), KernelCount() as count, OneKernel(count):
            run(tokens)
        found.append((count.kernels, count.waits))
    (kernels, waits), (more_kernels, more_waits) = found
    return (more_kernels - kernels) / (more - few), (more_waits - waits) / (more - few)
