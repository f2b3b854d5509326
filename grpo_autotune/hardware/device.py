"""The CUDA device of this process, as torch tells of it: the memory it may have, and the software that drives it."""

import importlib
import os
from typing import Any, NamedTuple

from grpo_autotune.hardware.device_memory import ALLOCATOR, asleep_bytes
from grpo_autotune.hardware.machine import package_version
from grpo_autotune.hardware.nvml import ask, driver, whole_card

KERNELS = {0: "math", 1: "flash", 2: "mem_efficient", 3: "cudnn"}
"""`torch.nn.attention.SDPBackend` by value, as `torch.backends.cuda` names them."""

ECC_MODE = "nvmlDeviceGetEccMode"
"""Gives whether memory is checked, now and after the next start; without HBM it takes memory and bandwidth."""


class DeviceRoom(NamedTuple):
    """Memory of a device: all of it, and what this process holds or could still take."""

    total: int
    usable: int


def room_of(device: Any) -> DeviceRoom | None:
    """Memory of a `torch.device` now; None if it is no CUDA device."""
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        import psutil  # the driver does not count what the kernel would give up of its caches

        free = max(free, int(psutil.virtual_memory().available))
    held = torch.cuda.memory_reserved(device) - asleep_bytes()
    return DeviceRoom(int(total), min(int(total), int(free) + max(0, held)))


def memory_share(device: Any) -> float:
    """Share of a `torch.device`'s memory that is in use, by whatever process; of the host's without CUDA."""
    import psutil
    import torch

    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return round(1.0 - free / total if total else psutil.virtual_memory().percent / 100, 4)


def runtime_facts(device: Any) -> dict[str, str]:
    """Versions and settings by which the same `torch.device` is fast or slow: of a CUDA device driver, libraries, power
    limit, attention kernels; of a CPU the threads."""
    torch: Any = importlib.import_module("torch")
    if device.type != "cuda":
        return {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    cudnn = torch.backends.cudnn.version()
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    facts = {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "triton": package_version("triton"),
        "sdpa": ", ".join(sdpa_order()),
        "allocator": next((os.environ[name] for name in ALLOCATOR if os.environ.get(name)), "default"),
    }
    with driver() as nvml:
        card = whole_card(nvml, handle_of(nvml, device))
        milliwatts, ecc = (ask(nvml, question, card) for question in ("nvmlDeviceGetEnforcedPowerLimit", ECC_MODE))
        facts["driver"] = ask(nvml, "nvmlSystemGetDriverVersion")
        facts["power_limit"] = None if milliwatts is None else f"{milliwatts / 1000:.0f} W"
        facts["ecc"] = None if ecc is None else "on" if ecc[0] else "off"
    return {name: fact for name, fact in facts.items() if fact is not None}


def handle_of(nvml: Any, device: Any) -> Any:
    """NVML's handle of a CUDA device, which torch knows by the UUID of the GPU or the MIG slice; None without one."""
    import torch

    uuid = torch.cuda.get_device_properties(device).uuid
    handles = (ask(nvml, "nvmlDeviceGetHandleByUUID", f"{kind}-{uuid}") for kind in ("MIG", "GPU"))
    return next((handle for handle in handles if handle is not None), None)


def sdpa_order() -> list[str]:
    """Attention kernels that are switched on, in the order in which torch asks them; vLLM switches cuDNN's off."""
    import torch

    order = [KERNELS[value] for value in torch._C._get_sdp_priority_order() if value in KERNELS]
    return [name for name in order if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
