"""Live tensor bytes on the CPU, as an allocator without rounding would see them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made while entered, now and at their most; what existed before counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors(
            (args, kwargs)
        ):  # not made by an operation; its address may be another's when it is freed
            self._count(tensor.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return made

    def _count(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
