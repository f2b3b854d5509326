"""The child of `benchmarks.gpu_check`: stages one after another in this process, each within its deadline."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.bench import Bench, Outcome, OutOfTime, deadline, tail_of

SECONDS = {
    "environment": 15.0,
    "correctness": 75.0,
    "attention": 80.0,
    "steps": 140.0,
    "decode": 90.0,
    "memory": 30.0,
    "failures": 35.0,
    "probe_cost": 25.0,
    "workers": 60.0,
}
"""Stage, a module beside this one, and the seconds that it may take; in order of worth."""

TINY = 4.0
"""Times those seconds, for tiny models on whatever processor there is."""

LATE_S = 20.0
"""Beyond its deadline a stage that cannot be interrupted takes the process along."""

CONTEXT_LOST = 3
"""Exit code: the device answers nobody in this process."""


def main() -> int:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--stages", nargs="+", required=True)
    options = parser.parse_args()
    until = time.monotonic() + options.limit
    if options.device == "cuda" and not gpu_is_here():
        for stage in options.stages:
            Outcome.of(options.out).close(stage, 0.0, "torch sees no GPU here: grpo-autotune doctor says why")
        return 0
    for stage in options.stages:
        faulthandler.dump_traceback_later(seconds_of(stage, options, until) + LATE_S, exit=True)
        usable = run(stage, options, until)
        faulthandler.cancel_dump_traceback_later()
        if not usable:
            return CONTEXT_LOST
    return 0


def gpu_is_here() -> bool:
    """Return whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def seconds_of(stage: str, options: argparse.Namespace, until: float) -> float:
    """Seconds that a stage may take from now on."""
    return min(SECONDS[stage] * (TINY if options.tiny else 1.0), until - time.monotonic())


def run(stage: str, options: argparse.Namespace, until: float) -> bool:
    """Run one stage; false where the device is lost to this process."""
    outcome, begin, used = Outcome.of(options.out), time.monotonic(), sum(os.times()[:4])
    seconds = seconds_of(stage, options, until)
    error: str | None = None
    sys.stderr.write(f"--- {stage}\n")
    outcome.begin(stage)
    try:
        bench = Bench(
            stage, outcome, device=options.device, tiny=options.tiny, out=options.out, scratch=options.scratch,
            until=begin + seconds,
        )  # fmt: skip
        with deadline(seconds):
            importlib.import_module(f"benchmarks.gpu.{stage}").measure(bench)
    except OutOfTime as over:
        error = f"{over}: {tail_of(over)}"
    except Exception as failure:  # noqa: BLE001
        error = tail_of(failure)
    outcome.close(stage, time.monotonic() - begin, error, sum(os.times()[:4]) - used)
    try:
        bench.release()
        bench.sync()
    except Exception:  # noqa: BLE001
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
