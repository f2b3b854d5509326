"""The CUDA device of this process, as torch tells of it: the memory it may have, and the software that drives it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class DeviceRoom(NamedTuple):
    """Memory of a device: all of it, and what this process holds or could still take."""

    total: int
    usable: int


def room_of(device: Any) -> DeviceRoom | None:
    """Memory of a `torch.device` now; None if it is no CUDA device.

    Where the host's memory is the device's, the driver does not count what the kernel would give up of its caches.
    """
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        import psutil

        free = max(free, int(psutil.virtual_memory().available))
    held = torch.cuda.memory_reserved(device) - _asleep_bytes()
    return DeviceRoom(int(total), min(int(total), int(free) + max(0, held)))


def _asleep_bytes() -> int:
    """Bytes of a sleeping vLLM engine, which torch counts as reserved and the device does not hold."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    pool = module.CuMemAllocator.instance if module is not None else None
    return sum(row.handle[1] for row in pool.pointer_to_data.values() if row.is_asleep) if pool is not None else 0
