"""GPUs as the driver's library NVML tells of them: those that CUDA shows this process, as CUDA numbers them.

What a part does not report (unified memory has no size of its own, MIG slices no power limit) is None, never an error.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

VISIBLE, ORDER, PCI = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
"""Left to itself CUDA numbers the fastest card 0; by `CUDA_DEVICE_ORDER=PCI_BUS_ID` as NVML and `nvidia-smi` do."""

BEFORE = "GRPO_AUTOTUNE_VISIBLE_DEVICES"
"""`CUDA_VISIBLE_DEVICES` as it was before a run left some of its GPUs to a server of its own."""

NODES = Path("/sys/devices/system/node")


class Gpu(BaseModel):
    """One GPU or MIG slice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # as the driver names it
    memory_bytes: int  # its memory; the host's, where it has none of its own
    capability: str  # compute capability, such as "9.0"; "0.0" where it is not reported
    unified: bool = False  # whether its memory is the host's (GB10, Jetson)


@contextmanager
def driver() -> Iterator[Any]:
    """NVML's bindings, ready to be asked; None where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """The answer of one of NVML's functions; None where the part, the driver or the machine has none, or about None."""
    if nvml is None or None in arguments:
        return None
    try:
        return getattr(nvml, question)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def all_handles(nvml: Any) -> list[Any]:
    """Handles of every GPU of the driver, in PCI order."""
    count = ask(nvml, "nvmlDeviceGetCount") or 0
    handles = (ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count))
    return [handle for handle in handles if handle is not None]


def visible_handles(nvml: Any, only: Sequence[str] | None = None) -> list[Any]:
    """Handles of the GPUs and MIG slices that CUDA shows this process, or one that has `only` these in its
    `CUDA_VISIBLE_DEVICES`, as the CUDA C++ Programming Guide has it ("CUDA environment variables"): the list ends at
    the first name that is none, and an index of a GPU with MIG stands for its first slice."""
    every, names = all_handles(nvml), visible_names() if only is None else list(only)
    handles = iter(every) if names is None else _find(nvml, every, names)
    return [_first_slice(nvml, handle) for handle in itertools.takewhile(lambda handle: handle is not None, handles)]


def visible_names() -> list[str] | None:
    """The names in `CUDA_VISIBLE_DEVICES`; None where every GPU is visible."""
    told = os.environ.get(BEFORE, os.environ.get(VISIBLE))
    return None if told is None else [name.strip() for name in told.split(",")]


def names_of_gpus(there: int) -> list[str]:
    """The `there` GPUs that CUDA shows this process, as `CUDA_VISIBLE_DEVICES` names them; the list ends at the
    first name that is none."""
    told = visible_names()
    names = map(str, range(there)) if told is None else itertools.takewhile(lambda name: name not in ("", "-1"), told)
    return list(names)[:there]


def describe(nvml: Any, handle: Any, host_bytes: int) -> Gpu:
    """One GPU, its memory the host's `host_bytes` where it has none of its own."""
    card = whole_card(nvml, handle)
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    capability = ask(nvml, "nvmlDeviceGetCudaComputeCapability", card) or (0, 0)
    unified = memory is None or not memory.total
    return Gpu(
        name=ask(nvml, "nvmlDeviceGetName", handle) or "unknown GPU",
        memory_bytes=host_bytes if unified else int(memory.total),
        capability=".".join(map(str, capability)),
        unified=unified,
    )


def whole_card(nvml: Any, handle: Any) -> Any:
    """The GPU that a MIG slice is part of; any other GPU itself."""
    card = ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
    return handle if card is None else card


def bytes_counted_as_host(nvml: Any) -> int:
    """Memory of GPUs that the kernel counts as the host's: a node of its own without cores (GH200, GB200)."""
    nodes = {ask(nvml, "nvmlDeviceGetNumaNodeId", handle) for handle in all_handles(nvml)} - {None}
    return sum(_bytes_without_cores(NODES / f"node{node}") for node in nodes)


def _find(nvml: Any, every: list[Any], names: list[str]) -> Iterator[Any]:
    """The handle of each name; None for a name of no GPU, or of more than one."""
    for name in names:
        if name.isdecimal():
            yield every[int(name)] if int(name) < len(every) else None
        elif name.startswith("GPU-"):
            alike = [handle for handle in every if (ask(nvml, "nvmlDeviceGetUUID", handle) or "").startswith(name)]
            yield alike[0] if len(alike) == 1 else None
        else:
            yield ask(nvml, "nvmlDeviceGetHandleByUUID", name) if name.startswith("MIG-") else None


def _first_slice(nvml: Any, handle: Any) -> Any:
    mode = ask(nvml, "nvmlDeviceGetMigMode", handle)  # now, and after the next reset
    if not mode or not mode[0]:
        return handle
    count = ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    slices = (ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(count))
    return next((piece for piece in slices if piece is not None), handle)


def _bytes_without_cores(node: Path) -> int:
    try:
        cores, told = (node / "cpulist").read_text().strip(), (node / "meminfo").read_text()
    except OSError:
        return 0
    total = re.search(r"MemTotal:\s+(\d+) kB", told)
    return 0 if cores or total is None else int(total[1]) * 1024
