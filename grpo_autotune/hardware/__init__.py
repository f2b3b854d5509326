"""This machine: processor, memory, GPUs, and the speed it was measured to reach."""

from grpo_autotune.hardware.ceilings import Ceilings, measure_ceilings
from grpo_autotune.hardware.gpus import find_gpu
from grpo_autotune.hardware.machine import Machine, detect, package_version
from grpo_autotune.hardware.nvml import Gpu

__all__ = ["Ceilings", "Gpu", "Machine", "detect", "find_gpu", "measure_ceilings", "package_version"]
