"""What this machine is and how fast it is: detected, looked up in a table, measured once and kept."""

from __future__ import annotations

from grpo_autotune.files import cache_dir
from grpo_autotune.hardware.ceilings import Ceilings, measure_ceilings
from grpo_autotune.hardware.gpus import GPUS, GpuRow, find_gpu
from grpo_autotune.hardware.machine import Gpu, Machine, detect, package_version

__all__ = [
    "GPUS",
    "Ceilings",
    "Gpu",
    "GpuRow",
    "Machine",
    "cache_dir",
    "detect",
    "find_gpu",
    "measure_ceilings",
    "package_version",
]
