"""Stage workers: two trials by the search's own worker, cold and warm, and the memory that is back afterwards."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.environment import smi
from benchmarks.gpu.models import SHORT, run_config
from grpo_autotune.records.trial import TrialSpec
from grpo_autotune.trials.parent.runner import Runner

SAME_BYTES = 50 * 2**20


def measure(bench: Bench) -> None:
    """Write the rows."""
    config = run_config(bench, "auto").to_dict()
    bench.release()
    before = torch.cuda.mem_get_info()[0] if bench.on_gpu else 0
    predicted = {False: (15.0, 25.0), True: (3.0, 6.0)}
    with Runner(bench.scratch / "trials") as runner:
        for number in range(2):
            spec = TrialSpec(
                number=number, config=config, steps=1, completion_lengths=[SHORT], limit_s=max(5.0, bench.left() - 3.0)
            )
            outcome = runner.run(spec)
            name = "warm" if outcome.warm else "cold"
            ok = outcome.status == "ok" and outcome.warm == bool(number)
            bench.row(
                f"a trial, {name}",
                outcome.elapsed_s,
                "s",
                predicted=predicted[outcome.warm],
                ok=ok,
                note=outcome.why or "",
            )
            bench.row(f"start-up, {name}", outcome.startup_s, "s")
            if outcome.peak_bytes is not None:
                bench.row(f"peak of the trial, {name}", outcome.peak_bytes / 1e9, "GB")
    if bench.on_gpu:
        after = torch.cuda.mem_get_info()[0]
        bench.row("memory not back after the workers", (before - after) / 2**20, "MiB", ok=before - after <= SAME_BYTES)
        bench.row("nvidia-smi", smi("memory.used,memory.free"))
