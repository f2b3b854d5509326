"""Stage environment: versions, the order of attention backends, the context's cost, import seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.bench import Bench

QUERIED = "driver_version,power.limit,clocks.sm,clocks.max.sm,persistence_mode,mig.mode.current,ecc.mode.current"


def measure(bench: Bench) -> None:
    """Write the rows, and the machine."""
    import torch

    if bench.on_gpu:
        begin = time.perf_counter()
        torch.zeros(1, device=bench.device)
        torch.cuda.synchronize()
        bench.row("first use of the device", time.perf_counter() - begin, "s", predicted=(0.3, 1.0))
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        bench.row("memory in use with a context", (total - free) / 1e9, "GB", predicted=(0.45, 0.6), note=name)
    from grpo_autotune.hardware import detect
    from grpo_autotune.hardware.device import runtime_facts, sdpa_order
    from grpo_autotune.probe.trainer_facts import versions

    runtime = runtime_facts(bench.device)
    machine: dict[str, Any] = {"machine": detect().model_dump(mode="json"), "versions": versions(), "runtime": runtime}
    machine["gpu"] = runtime.get("gpu", "cpu")
    if bench.on_gpu:
        machine["nvidia_smi"] = smi(QUERIED)
    bench.outcome.content["machine"] = machine
    bench.outcome.write()
    with bench.part("order of attention backends"):
        order = sdpa_order()
        bench.row("first attention backend", order[0], note=f"{', '.join(order)}; cudnn is expected first")
    if not bench.tiny:
        bench.row("seconds to import torch and TRL", import_s(), "s", predicted=(4.0, 8.0))


def import_s() -> float:
    """Seconds of a fresh process that imports torch and TRL's trainer."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, trl; trl.GRPOTrainer"], check=True, timeout=60)
    return time.perf_counter() - begin


def smi(fields: str) -> str:
    """The driver's own answer, as text."""
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
