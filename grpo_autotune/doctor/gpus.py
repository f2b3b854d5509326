"""Checks of the GPUs that CUDA shows: what makes them slower than they are, or takes of their memory."""

import importlib
import itertools
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from grpo_autotune.doctor.finding import Finding
from grpo_autotune.hardware import find_gpu
from grpo_autotune.hardware.device import runtime_facts
from grpo_autotune.hardware.machine import Machine
from grpo_autotune.hardware.nvml import VISIBLE, ask, driver, visible_handles, whole_card
from grpo_autotune.units import GIB, listing, size

HELD_BACK = {0x04: "the power limit", 0x08: "the hardware", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power supply"}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` that slow a GPU down (`nvmlClocksEventReason...` in pynvml)."""

READ, NVLINK, REACHED, UNCORRECTED, SINCE_LOADED = 0, 2, 0, 1, 0
"""`NVML_P2P_CAPS_INDEX_READ` (the bindings have a tuple), `..._NVLINK`, `NVML_P2P_STATUS_OK`,
`NVML_MEMORY_ERROR_TYPE_UNCORRECTED`, and `NVML_VOLATILE_ECC`, which counts since the driver was loaded."""

SEEN_AS_USED = GIB
"""Memory in use from which on somebody else holds it, where a container hides the processes."""


def check_gpus(machine: Machine) -> Finding:
    """The GPUs that CUDA shows this process, and whether the first takes bfloat16."""
    if not machine.gpus and machine.driver:
        detail = f"the driver {machine.driver} shows no GPU ({VISIBLE}={os.environ.get(VISIBLE)})"
        return Finding("gpu", "warn", detail, f"unset {VISIBLE}, or name a GPU that is there (nvidia-smi -L)")
    if not machine.gpus:
        return Finding("gpu", "ok", "no NVIDIA driver: no GPU use, memory or power is sampled")
    cards = ", ".join(f"{gpu.name} ({size(gpu.memory_bytes)}{' of the host' * gpu.unified})" for gpu in machine.gpus)
    row = find_gpu(machine.gpus[0].name)
    if row is not None and not row.bfloat16:
        remedy = "set model.dtype: float16 and grpo.fp16: true"
        return Finding("gpu", "warn", f"{cards}: no bfloat16", remedy)
    return Finding("gpu", "ok", cards if row else f"{cards}: not in the table of cards, measured like any other")


def check_setting(machine: Machine) -> Iterator[Finding]:
    """Settings around the GPUs: torch's, the process's limit on addresses, and the number of processes."""
    if not (gpus := len(machine.gpus)):
        return
    with suppress(ImportError, OSError):
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available():  # versions and settings by which the same GPU is fast or slow
            facts = runtime_facts(torch.device("cuda"))
            yield Finding("gpu runtime", "ok", "; ".join(f"{name} {fact}" for name, fact in facts.items()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        yield Finding("addresses", "ok", "not limited")
    else:  # a CUDA context maps more than there is memory
        detail = f"limited to {size(limit)}: a CUDA context maps more than 100 GiB and does not start"
        yield Finding("addresses", "fail", detail, "ulimit -v unlimited")
    if gpus > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        detail = f"one process trains on one of the {gpus} GPUs, the others idle"
        yield Finding("processes", "warn", detail, f"torchrun --nproc-per-node {gpus} -m grpo_autotune train ...")


def check_health() -> list[Finding]:
    """State of the GPUs, by the driver. To be asked before torch opens a context, which may count as somebody's."""
    with driver() as nvml:
        return list(_health(nvml, visible_handles(nvml)))


def _health(nvml: Any, handles: Sequence[Any]) -> Iterator[Finding]:
    cards = [whole_card(nvml, handle) for handle in handles]
    if not cards:
        return
    if held := [words for index, handle in enumerate(handles) if (words := _held(nvml, index, handle))]:
        remedy = "end what is not needed (nvidia-smi lists it), or choose other GPUs with CUDA_VISIBLE_DEVICES"
        yield Finding("gpu memory", "warn", f"others hold {listing(held)}", remedy)
    else:
        yield Finding("gpu memory", "ok", "nobody else holds any")
    slowed: list[str] = []
    for index, card in enumerate(cards):
        bits = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", card)
        if bits is None:  # a driver before 535
            bits = ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", card) or 0
        slowed += [f"GPU {index} by {word}" for bit, word in HELD_BACK.items() if bits & bit]
    if slowed:
        remedy = "look at cooling and `nvidia-smi -q -d POWER`"
        yield Finding("gpu clocks", "warn", f"held back: {listing(slowed)}", remedy)
    if 0 in [ask(nvml, "nvmlDeviceGetPersistenceMode", card) for card in cards]:
        detail = "persistence mode is off: every process and every trial of a search starts seconds later"
        yield Finding("gpu driver", "warn", detail, "sudo nvidia-smi -pm 1, or run nvidia-persistenced")
    counts = [ask(nvml, "nvmlDeviceGetTotalEccErrors", card, UNCORRECTED, SINCE_LOADED) for card in cards]
    if told := [f"{count} of GPU {index}" for index, count in enumerate(counts) if count]:  # each ended a process
        detail = f"uncorrected memory errors since the driver was loaded: {listing(told)}"
        yield Finding("gpu errors", "warn", detail, "choose another GPU, or have it reset (nvidia-smi -q -d ECC)")
    pairs = list(itertools.combinations(handles, 2))
    ways = [[ask(nvml, "nvmlDeviceGetP2PStatus", *pair, way) == REACHED for way in (READ, NVLINK)] for pair in pairs]
    if not all(read for read, _ in ways):
        detail = "no peer access between some: NCCL goes through the host's memory"
        yield Finding("gpu links", "warn", detail, "train on GPUs that reach each other (nvidia-smi topo -p2p r)")
    elif pairs:
        between = all(nvlink for _, nvlink in ways)
        yield Finding(
            "gpu links", "ok", f"{'NVLink' if between else 'peer access, without NVLink for some,'} between all"
        )


def _held(nvml: Any, index: int, handle: Any) -> str:
    """Memory of a GPU that other processes hold, in words; nothing where it is little."""
    running = ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ()
    others = [process for process in running if process.pid != os.getpid()]
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    held = sum(process.usedGpuMemory or 0 for process in others) or (memory.used if memory is not None else 0)
    pids = f" (pid {', '.join(str(process.pid) for process in others)})" if others else ""
    return f"{size(held)} of GPU {index}{pids}" if others or held >= SEEN_AS_USED else ""
