"""How far a real language model learns to add: held-out accuracy of `make demo-text`, over several seeds.

    python -m benchmarks.demo_text [SEEDS] [--resume]

`--resume` goes on behind the seeds that the JSON holds. Each seed is one call of `grpo-autotune train
examples/arithmetic.yaml` in a process of its own, timed from its start to its end. An accuracy is the share of 128
questions, none of them in a training row, whose sampled answer is right, with Wilson's interval; the gain's interval
is Student's over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from benchmarks.result import CONFIDENCE, FOLDER, write
from examples.arithmetic import additions
from examples.smollm2 import ROOT, model_folder
from grpo_autotune.records.evaluations import half_interval

CONFIG = "examples/arithmetic.yaml"
METRIC = "eval_rewards/numeric_match/mean"


def main() -> None:
    """Train once a seed, and write `docs/benchmarks/demo_text.json` after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="?", type=int, default=3)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    model_folder()
    rows = json.loads((FOLDER / "demo_text.json").read_text())["rows"] if asked.resume else []
    for seed in range(len(rows), asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_run(seed, Path(folder) / "run"))
        sys.stdout.write(f"{summarised(rows)}\n")


def summarised(rows: list[dict[str, Any]]) -> Path:
    """Write the JSON: accuracies as means over seeds, and the minutes of each seed's whole command."""
    measures = {
        "held_out_accuracy_before": [row["curve"][0]["accuracy"] for row in rows],
        "held_out_accuracy_after": [row["curve"][-1]["accuracy"] for row in rows],
        "held_out_accuracy_gain": [row["gain"] for row in rows],
        "minutes": [row["wall_s"] / 60 for row in rows],
    }
    ratios = {name: _mean(values) for name, values in measures.items()}
    return write("demo_text", "python -m benchmarks.demo_text", rows, ratios)


def _run(seed: int, run: Path) -> dict[str, Any]:
    """Train with a seed as `make demo-text` does; its held-out accuracies, reward of each step, and seconds."""
    load, begun = os.getloadavg()[0], time.monotonic()
    command = [sys.executable, "-m", "grpo_autotune", "train", CONFIG, "--out", str(run), "--set", f"grpo.seed={seed}"]
    subprocess.run(command, cwd=ROOT, check=True)
    wall_s = time.monotonic() - begun
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    count = len(additions("test"))
    curve = [_accuracy(line["step"], line[METRIC], count) for line in lines if METRIC in line]
    steps = [line for line in lines if line["kind"] == "train" and "reward" in line]
    return {
        "seed": seed,
        "curve": curve,
        "gain": curve[-1]["accuracy"] - curve[0]["accuracy"],
        "held_out_rows": count,
        "wall_s": wall_s,
        "load_average_before": load,
        "step_s": [line["step_time"] for line in steps],
        "train_accuracy": [line["reward"] for line in steps],
        "completion_tokens": [line["completions/mean_length"] for line in steps],
    }


def _accuracy(step: int, share: float, count: int) -> dict[str, float]:
    interval = binomtest(round(share * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return {"step": step, "accuracy": share, "low": float(interval.low), "high": float(interval.high)}


def _mean(values: list[float]) -> dict[str, float]:
    """Mean with Student's 95 % interval; of one value without."""
    mean, n = fmean(values), len(values)
    half = half_interval(values, CONFIDENCE) if n > 1 else 0.0
    return {"median": mean, "low": mean - half, "high": mean + half, "n": n}


if __name__ == "__main__":
    main()
