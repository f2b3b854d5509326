"""A check of this package on a GPU: nine stages in order of worth, predictions beside measurements.

    python -m benchmarks.gpu_check [--out DIR] [--limit 530] [--stages correctness steps ...] [--device cpu --tiny]

`DIR/gpu.json` is rewritten whole after every row; beside it stand the spans of measured steps, kernels by stage
(`profile.json`), memory statistics (`memory.json`) and the log (`check.log`). A stage that fails or is too slow is a
line of text, and the next one begins. Stages run in a child process; where one takes it along (a CUDA error leaves no
usable context), the rest runs in a new one. Nothing is downloaded: models have random weights of real shapes.

`--device cpu --tiny` runs every line that needs no GPU on models of two layers, in about a minute.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.bench import Outcome
from benchmarks.gpu.stages import SECONDS
from grpo_autotune.hardware.device_memory import expand_segments

SPARE_S = 5.0
"""Of the limit: to end the child and print."""


def main() -> int:
    """Run the stages; 1 where a bar was missed or a stage failed."""
    parser = argparse.ArgumentParser(description="Check this package on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--limit", type=float, default=530.0, help="seconds in all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of two layers")
    parser.add_argument("--stages", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    options = parser.parse_args()
    until = time.monotonic() + options.limit - SPARE_S
    options.out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome.of(options.out)
    outcome.path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        left = list(options.stages)
        while left and time.monotonic() < until:
            run_child(options, left, Path(scratch), until - time.monotonic())
            outcome = Outcome.of(options.out)
            ended = outcome.content["under_way"] or next((stage for stage in left if done(outcome, stage)), left[0])
            if not done(outcome, ended):
                outcome.close(ended, 0.0, f"its process ended; see check.log in {options.out}")
            left = [stage for stage in left if not done(outcome, stage)]
    for stage in left:
        outcome.close(stage, 0.0, "not begun: no time was left")
    Console(width=None if sys.stdout.isatty() else 180).print(*tables(outcome))
    sys.stdout.write(f"\n{outcome.path}\n")
    return int(any(row["ok"] is False for row in outcome.content["rows"]) or bool(errors(outcome)))


def done(outcome: Outcome, stage: str) -> bool:
    """True once a stage has ended, well or not."""
    return stage in outcome.content["stages"]


def run_child(options: argparse.Namespace, stages: list[str], scratch: Path, limit_s: float) -> None:
    """Run stages in one process until they are done, it dies, or the time is over."""
    words = [sys.executable, "-m", "benchmarks.gpu.stages", "--out", str(options.out), "--scratch", str(scratch)]
    words += ["--device", options.device, *(["--tiny"] if options.tiny else []), "--limit", f"{limit_s:.1f}"]
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    offline = {"HF_HUB_OFFLINE": "1", "GRPO_AUTOTUNE_CACHE": str(scratch / "cache")}
    environment = {**os.environ, **threads, **offline, "GRPO_AUTOTUNE_TEST_DEVICE": options.device}
    expand_segments(environment)  # as the commands do
    with (options.out / "check.log").open("ab") as log:
        try:
            subprocess.run(
                [*words, "--stages", *stages], stdout=log, stderr=log, env=environment, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            log.write(b"the time is over\n")


def tables(outcome: Outcome) -> list[Table]:
    """The rows as a table, and how the stages ended."""
    rows = Table("stage", "measurement", "predicted", "measured", "unit", "", title="GPU check")
    for row in outcome.content["rows"]:
        low_high = "" if row["predicted"] is None else " to ".join(f"{value:.3g}" for value in row["predicted"])
        measured = row["measured"]
        told = f"{measured:.4g}" if isinstance(measured, int | float) else str(measured)
        verdict = {True: "ok", False: "WRONG", None: ""}[row["ok"]]
        rows.add_row(row["stage"], row["name"], low_high, told, row["unit"], verdict)
    stages = Table("stage", "seconds", "CPU", "error", title=str(outcome.content["machine"].get("gpu", "")))
    for name, stage in outcome.content["stages"].items():
        error = (stage["error"] or "").strip().splitlines()
        stages.add_row(name, f"{stage['seconds']:.0f}", f"{stage['cpu_s']:.0f}", error[-1] if error else "")
    return [rows, stages]


def errors(outcome: Outcome) -> list[str]:
    """Stages that did not end well."""
    return [name for name, stage in outcome.content["stages"].items() if stage["error"]]


if __name__ == "__main__":
    sys.exit(main())
