"""Preparations before torch, transformers and TRL are imported."""

import os
from contextlib import suppress

from grpo_autotune.console import say
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import cache_dir
from grpo_autotune.hardware.nvml import ORDER, PCI
from grpo_autotune.seams.torchvision_compat import ensure_torchvision, tell_once

COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm"}
"""What says where compiled kernels are kept -> their folder in `compiled` of the package's cache."""


def set_environment() -> None:
    """Set for torch and every child process what the user left open: GPUs are numbered as `nvidia-smi` numbers them,
    and compiled kernels outlive a machine's `/tmp` and a container without a home."""
    os.environ.setdefault(ORDER, PCI)
    with suppress(EnvironmentProblem):  # a finding of `doctor`
        folder = cache_dir("compiled")
        for name, kind in COMPILED.items():
            os.environ.setdefault(name, str(folder / kind))


def mend_torchvision() -> None:
    """Make torchvision importable beside a torch it was not built for, and say so once per environment; have PEFT log
    nothing that no run needs."""
    finding = ensure_torchvision()
    from grpo_autotune.train.runs.quiet import drop_log_lines  # a package that needs torchvision

    drop_log_lines()
    if finding is not None:
        tell_once(finding, say)
