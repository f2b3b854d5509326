"""Checks of the GPUs that CUDA shows: what makes them slower than they are, or takes of their memory."""

from __future__ import annotations

import importlib
import itertools
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_autotune.doctor.finding import Finding
from grpo_autotune.hardware import find_gpu
from grpo_autotune.hardware.device import runtime_facts
from grpo_autotune.hardware.machine import Machine
from grpo_autotune.hardware.nvml import VISIBLE, ask, driver, visible_handles, whole_card
from grpo_autotune.units import GIB, listing, size

HELD_BACK = {
    0x04: "the power limit",
    0x08: "the hardware",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "the power supply",
}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` that slow a GPU down (`nvmlClocksEventReason...` in pynvml)."""

READ, NVLINK, REACHED = 0, 2, 0
"""`NVML_P2P_CAPS_INDEX_READ`, `..._NVLINK` and `NVML_P2P_STATUS_OK` (the bindings have a tuple for the first)."""

UNCORRECTED, SINCE_LOADED = 1, 0
"""`NVML_MEMORY_ERROR_TYPE_UNCORRECTED` and `NVML_VOLATILE_ECC`, which counts since the driver was loaded."""

SEEN_AS_USED = GIB
"""Memory in use from which on somebody else holds it, where a container hides the processes."""


def check_gpus(machine: Machine) -> Finding:
    """The GPUs that CUDA shows this process, and whether the first takes bfloat16."""
    if not machine.gpus and machine.driver:
        detail = f"the driver {machine.driver} shows no GPU ({VISIBLE}={os.environ.get(VISIBLE)})"
        return Finding("gpu", "warn", detail, f"unset {VISIBLE}, or name a GPU that is there (nvidia-smi -L)")
    if not machine.gpus:
        return Finding("gpu", "ok", "no NVIDIA driver: no GPU use, memory or power is sampled")
    cards = ", ".join(
        f"{gpu.name} ({size(gpu.memory_bytes)}{' of the host' if gpu.unified else ''})" for gpu in machine.gpus
    )
    row = find_gpu(machine.gpus[0].name)
    if row is not None and not row.bfloat16:
        remedy = "set model.dtype: float16 and grpo.fp16: true"
        return Finding("gpu", "warn", f"{cards}: no bfloat16", remedy)
    return Finding("gpu", "ok", cards if row else f"{cards}: not in the table of cards, measured like any other")


def check_setting(machine: Machine) -> list[Finding]:
    """Settings around the GPUs: torch's, the process's limit on addresses, and the number of processes."""
    return [*_torch(), _addresses(), *_processes(len(machine.gpus))] if machine.gpus else []


def check_health() -> list[Finding]:
    """State of the GPUs, by the driver. To be asked before torch opens a context, which may count as somebody's."""
    with driver() as nvml:
        handles = visible_handles(nvml)
        checks = (_held, _clocks, _persistence, _memory_errors, _links)
        findings = [check(nvml, handles) for check in checks] if handles else []
    return [finding for finding in findings if finding is not None]


def _held(nvml: Any, handles: Sequence[Any]) -> Finding:
    """Memory that other processes hold."""
    told = []
    for index, handle in enumerate(handles):
        running = ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
        others = [process for process in running if process.pid != os.getpid()]
        memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
        held = sum(process.usedGpuMemory or 0 for process in others) or (memory.used if memory is not None else 0)
        if others or held >= SEEN_AS_USED:
            pids = ", ".join(str(process.pid) for process in others)
            told.append(f"{size(held)} of GPU {index}" + (f" (pid {pids})" if pids else ""))
    if not told:
        return Finding("gpu memory", "ok", "nobody else holds any")
    remedy = "end what is not needed (nvidia-smi lists it), or choose other GPUs with CUDA_VISIBLE_DEVICES"
    return Finding("gpu memory", "warn", f"others hold {listing(told)}", remedy)


def _clocks(nvml: Any, handles: Sequence[Any]) -> Finding | None:
    """GPUs that run slower than they could."""
    told = []
    for index, handle in enumerate(handles):
        card = whole_card(nvml, handle)
        bits = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", card)
        if bits is None:  # a driver before 535
            bits = ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", card) or 0
        told += [f"GPU {index} by {word}" for bit, word in HELD_BACK.items() if bits & bit]
    if not told:
        return None
    return Finding("gpu clocks", "warn", f"held back: {listing(told)}", "look at cooling and `nvidia-smi -q -d POWER`")


def _persistence(nvml: Any, handles: Sequence[Any]) -> Finding | None:
    """Persistence mode: without it the driver lets go of an idle GPU."""
    modes = [ask(nvml, "nvmlDeviceGetPersistenceMode", whole_card(nvml, handle)) for handle in handles]
    if 0 not in modes:
        return None
    detail = "persistence mode is off: every process and every trial of a search starts seconds later"
    return Finding("gpu driver", "warn", detail, "sudo nvidia-smi -pm 1, or run nvidia-persistenced")


def _memory_errors(nvml: Any, handles: Sequence[Any]) -> Finding | None:
    """Errors of memory that ECC could not correct: each ended a process, and the next may."""
    counts = [
        ask(nvml, "nvmlDeviceGetTotalEccErrors", whole_card(nvml, handle), UNCORRECTED, SINCE_LOADED)
        for handle in handles
    ]
    told = [f"{count} of GPU {index}" for index, count in enumerate(counts) if count]
    if not told:
        return None
    detail = f"uncorrected memory errors since the driver was loaded: {listing(told)}"
    return Finding("gpu errors", "warn", detail, "choose another GPU, or have it reset (nvidia-smi -q -d ECC)")


def _links(nvml: Any, handles: Sequence[Any]) -> Finding | None:
    """The way from GPU to GPU; None for a single one."""
    pairs = list(itertools.combinations(handles, 2))
    if not pairs:
        return None
    ways = [[ask(nvml, "nvmlDeviceGetP2PStatus", *pair, way) == REACHED for way in (READ, NVLINK)] for pair in pairs]
    if all(nvlink for _, nvlink in ways):
        return Finding("gpu links", "ok", "NVLink between all")
    if all(read for read, _ in ways):
        return Finding("gpu links", "ok", "peer access between all, without NVLink between some")
    detail = "no peer access between some: NCCL goes through the host's memory"
    return Finding("gpu links", "warn", detail, "train on GPUs that reach each other (nvidia-smi topo -p2p r)")


def _torch() -> Iterator[Finding]:
    """Versions and settings by which the same GPU is fast or slow."""
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError):
        return
    if torch.cuda.is_available():
        facts = runtime_facts(torch.device("cuda"))
        yield Finding("gpu runtime", "ok", "; ".join(f"{name} {fact}" for name, fact in facts.items()))


def _addresses() -> Finding:
    """A limit on addresses, of which a CUDA context maps more than there is memory."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("addresses", "ok", "not limited")
    detail = f"limited to {size(limit)}: a CUDA context maps more than 100 GiB and does not start"
    return Finding("addresses", "fail", detail, "ulimit -v unlimited")


def _processes(gpus: int) -> Iterator[Finding]:
    if gpus > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        detail = f"one process trains on one of the {gpus} GPUs, the others idle"
        yield Finding("processes", "warn", detail, f"torchrun --nproc-per-node {gpus} -m grpo_autotune train ...")
