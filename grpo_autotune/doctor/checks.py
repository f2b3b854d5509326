"""Checks of the machine and of the installed packages: findings, each with a remedy.

Nothing is asked over the network. A missing or broken package is a finding, never an error.
"""

import importlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from grpo_autotune.doctor.finding import Finding, Status
from grpo_autotune.doctor.gpus import check_gpus, check_health, check_setting
from grpo_autotune.errors import EnvironmentProblem, printable
from grpo_autotune.files import cache_dir
from grpo_autotune.hardware import detect, package_version
from grpo_autotune.hardware.machine import Machine
from grpo_autotune.hardware.versions import PACKAGES, Package
from grpo_autotune.seams.torchvision_compat import REMEDY as TORCHVISION_REMEDY
from grpo_autotune.seams.torchvision_compat import ensure_torchvision
from grpo_autotune.units import GIB, size

CACHE_WARN_BYTES, CACHE_FAIL_BYTES = 10 * GIB, GIB // 2
MEMORY_WARN_BYTES, SHM_WARN_BYTES = 8 * GIB, GIB
SHM = Path("/dev/shm")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def run_checks() -> list[Finding]:
    """Run every check, the most basic first."""
    machine, health = detect(), check_health()
    findings = [check_torch(machine), check_torchvision(), *map(check_package, PACKAGES), check_gpus(machine), *health]
    findings += [*check_setting(machine), check_memory(machine), check_threads(machine), check_cache()]
    return [Finding("python", "ok", platform.python_version()), *findings, check_shared_memory(), check_hub()]


def check_torch(machine: Machine) -> Finding:
    """torch imports, and reaches the GPUs that the driver has."""
    version = package_version("torch")
    if version is None:
        return Finding("torch", "fail", "not installed", "pip install torch")
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("torch", "fail", f"{version} cannot be imported: {printable(str(error))}", "reinstall torch")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("torch", "ok", f"{version} on {names}")
    if machine.gpus:
        remedy = "install a CUDA build of torch that the driver supports, and look at CUDA_VISIBLE_DEVICES"
        return Finding("torch", "fail", f"{version} cannot use the driver's {machine.gpus[0].name}", remedy)
    return Finding("torch", "ok", f"{version} on {torch.get_num_threads()} CPU threads: enough for small models")


def check_torchvision() -> Finding:
    """torchvision fits the installed torch; if not, the finding says how this package deals with it."""
    version = package_version("torchvision")
    if version is None:
        return Finding("torchvision", "warn", "not installed: images cannot be processed", "pip install torchvision")
    if (problem := ensure_torchvision()) is None:
        return Finding("torchvision", "ok", version)
    detail = f"{version} beside torch {package_version('torch')}: {problem.partition('. To mend it')[0]}"
    if "cannot be imported" in problem:
        return Finding("torchvision", "fail", detail, TORCHVISION_REMEDY)
    return Finding("torchvision", "warn", detail, f"{TORCHVISION_REMEDY}; until then it works in this package alone")


def check_package(row: Package) -> Finding:
    """One package is installed, in a version that works, and was tried."""
    present = row.present()
    if present is None:
        return Finding(row.distribution, "fail" if row.needed else "ok", f"not installed ({row.purpose})", row.remedy)
    name, version = present
    told = version if name == row.distribution else f"{version} ({name})"
    if not row.fits(version):
        status: Status = "fail" if row.needed else "warn"
        return Finding(row.distribution, status, f"{version} is outside {row.versions}", row.remedy)
    if row.is_untried(version):
        told = f"{told} is newer than what was tried (to {row.tried[-1]})"
        return Finding(row.distribution, "warn", told, f'if something breaks: pip install "{name}=={row.tried[-1]}"')
    return Finding(row.distribution, "ok", told)


def check_memory(machine: Machine) -> Finding:
    """There is enough memory for a small model."""
    status: Status = "ok" if machine.memory_bytes >= MEMORY_WARN_BYTES else "warn"
    remedy = "" if status == "ok" else "raise the container's limit, or keep to models under 0.5 billion weights"
    return Finding("memory", status, f"{size(machine.memory_bytes)} usable", remedy)


def check_threads(machine: Machine) -> Finding:
    """`OMP_NUM_THREADS` neither wastes cores nor oversubscribes them."""
    text, cores = os.environ.get("OMP_NUM_THREADS", ""), machine.cores
    if not text.isdigit():
        return Finding("threads", "ok", f"OMP_NUM_THREADS is not set: torch takes the {cores} cores")
    threads, detail = int(text), f"OMP_NUM_THREADS={text} on {cores} cores"
    if threads > cores:
        return Finding("threads", "warn", f"{detail}: threads wait for each other", f"set it to {cores} or fewer")
    if threads < cores and not machine.gpus:
        return Finding("threads", "warn", f"{detail}: the others idle", f"set it to {cores} divided by processes")
    return Finding("threads", "ok", detail)


def check_cache() -> Finding:
    """The cache folder can be written and has room."""
    try:
        folder = cache_dir()
        free = shutil.disk_usage(folder).free
    except (OSError, EnvironmentProblem) as error:
        return Finding(
            "cache", "fail", printable(str(error)), "point GRPO_AUTOTUNE_CACHE to a folder that can be written"
        )
    remedy = "make room, or point GRPO_AUTOTUNE_CACHE elsewhere"
    if not os.access(folder, os.W_OK):
        return Finding("cache", "fail", f"{folder} cannot be written", remedy)
    status: Status = "fail" if free < CACHE_FAIL_BYTES else "warn" if free < CACHE_WARN_BYTES else "ok"
    return Finding("cache", status, f"{folder}: {size(free)} free", remedy if status != "ok" else "")


def check_shared_memory() -> Finding:
    """Loader workers and NCCL pass tensors through shared memory, which containers keep small."""
    if not SHM.is_dir():
        return Finding("shared memory", "ok", f"no {SHM} on this system")
    total = shutil.disk_usage(SHM).total
    detail, remedy = f"{size(total)} in {SHM}", "start the container with --shm-size=8g"
    if total < SHM_WARN_BYTES:
        return Finding("shared memory", "warn", f"{detail}: loader workers may die", remedy)
    return Finding("shared memory", "ok", detail)


def check_hub() -> Finding:
    """The folder of downloads, and whether they are switched off; the hub itself is not asked."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    off = ", ".join(name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"))
    told = f"downloads are switched off by {off}: models and data must be folders or already in {home}"
    return Finding("hub", "ok", told if off else f"downloads go to {home} (not tried)")
