"""Stage memory: the formula against what the allocator and the device say, for passes of other sizes."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import fixed, release_trainer, run_config, train, trainer_of
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.device_memory import DEVICE_MEMORY
from grpo_autotune.predict.memory import increment
from grpo_autotune.predict.workload import workload
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord

CASES: dict[str, dict[str, Any]] = {
    "no checkpointing, micro batch 4": {"gradient_checkpointing": False},
    "checkpointing, micro batch 16": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
}
WITHIN = (0.85, 1.15)
KEPT = ("allocated_bytes.all.current", "reserved_bytes.all.current", "num_alloc_retries", "num_ooms")
LARGEST = 20


def measure(bench: Bench) -> None:
    """Write the rows of each case; speed-ups are off, as the formula counts plain passes there."""
    for name, grpo in list(CASES.items())[: 1 if bench.tiny else None]:
        with bench.part(name):
            config = run_config(bench, "none", **({"gradient_checkpointing": False} if bench.tiny else grpo))
            idle_bytes = allocated(bench)
            trainer = trainer_of(bench, config)
            lengths = fixed(bench, trainer, warmup=2)
            probe = Probe(trainer, warmup=1)
            try:
                train(trainer, 1, probe)
            finally:
                probe.detach()
                lengths.remove()
            tell_memory(bench, name, config, probe.record(), idle_bytes)
            release_trainer(trainer)


def allocated(bench: Bench) -> int:
    """Bytes that tensors hold now, 0 on a CPU; the peaks of earlier runs in this process are forgotten."""
    bench.release()
    DEVICE_MEMORY.restart()
    return DEVICE_MEMORY.in_use()


def tell_memory(bench: Bench, name: str, config: RunConfig, record: ProbeRecord, idle_bytes: int) -> None:
    """Rows of one run's peak: the formula over allocated, reserved over allocated, and what the device says beside.

    The formula counts plain passes, so that there is no bar where speed-ups are on.
    """
    peak = max((row.peak_bytes or 0 for row in record.timings.stages), default=0) - idle_bytes
    formula = increment(workload(config, config, record, detect(), measured=True))
    if not bench.on_gpu:
        bench.row(f"{name}: the formula's peak", formula / 1e6, "MB", note="no device to compare it with")
        return
    stats = torch.cuda.memory_stats()
    plain = config.speedups == "none"
    predicted = None if not plain else WITHIN if config.grpo.get("gradient_checkpointing", True) else (0.65, 1.15)
    share = formula / max(1, peak)
    bar = WITHIN[0] <= share <= WITHIN[1]
    note = f"{formula / 1e9:.2f} GB by the formula, {peak / 1e9:.2f} GB allocated"
    bench.row(
        f"{name}: formula over allocated",
        share,
        "",
        predicted=predicted,
        ok=None if bench.tiny or not plain else bar,
        note=note,
    )
    over_run = record.model_dump().get("device_memory") or {}  # the gauge resets the allocator's own peaks
    reserved = over_run.get("reserved_bytes", stats["reserved_bytes.all.current"])
    bench.row(f"{name}: reserved over allocated", reserved / max(1, peak), "", predicted=(1.1, 3.0))
    free, total = torch.cuda.mem_get_info()
    beside = total - free - stats["reserved_bytes.all.current"]
    bench.row(f"{name}: beside the allocator", beside / 1e9, "GB", predicted=(0.6, 1.0))
    path = bench.out / "memory.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    blocks = sorted(
        (block["size"] for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
         for block in segment["blocks"]
         if block["state"] == "active_allocated"), reverse=True
    )  # fmt: skip
    kept[name] = over_run | {key: stats.get(key) for key in KEPT} | {"largest_live_bytes": blocks[:LARGEST]}
    path.write_text(json.dumps(kept, indent=1))
