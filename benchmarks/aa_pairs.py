"""Are a run and its repetition called within noise? Pairs of probes of the demo, one after the other.

    python -m benchmarks.aa_pairs FOLDER [PAIRS]

Probes are kept in FOLDER and not run again where they are there. A pair counts as told apart where the step or a single
stage is called faster or slower; beside the neighbours, every run is held against every other. `least_change` is the
smallest slow-down of a step that would have been called in a pair.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.result import CONFIDENCE, ratio, write
from grpo_autotune.commands.compare import compare_runs
from grpo_autotune.report.files import REPORT_FILE, load_report

STEPS = "8"


def held(a: Path, b: Path) -> dict[str, Any]:
    """One pair: what was called, and the other processes' cores."""
    pair = compare_runs([str(a), str(b)], None).pairs[0]
    low, middle, _ = pair.rows[0].change or (math.nan, math.nan, math.nan)
    others = [load.cores if (load := load_report(run).others) else None for run in (a, b)]
    return {
        "runs": [a.name, b.name],
        "step_s": [pair.rows[0].before_s, pair.rows[0].after_s],
        "called": [f"{row.name} {row.word}" for row in pair.rows if row.word != "within noise"],
        "least_change": (1.0 + middle) / (1.0 + low) - 1.0,
        "others_cores": others,
    }


def called(rows: Iterable[dict[str, Any]], *, only: str = "") -> dict[str, float]:
    """Share of pairs that are told apart, with its exact interval."""
    told = [any(words.startswith(only) for words in row["called"]) for row in rows]
    interval = binomtest(sum(told), len(told)).proportion_ci(CONFIDENCE)
    return {"median": sum(told) / len(told), "low": interval.low, "high": interval.high, "n": len(told)}


def main(folder: Path, pairs: int = 20) -> None:
    """Measure what is missing, compare, and write the outcome."""
    runs = [folder / f"run{number:02d}" for number in range(1, 2 * pairs + 1)]
    for run in (run for run in runs if not (run / REPORT_FILE).is_file()):
        words = ["probe", "demo", "--steps", STEPS, "--out", str(run)]
        subprocess.run([sys.executable, "-m", "grpo_autotune", *words], check=True, stdout=subprocess.DEVNULL)
    rows = [held(a, b) for a, b in zip(runs[::2], runs[1::2], strict=True)]
    ratios = {"pairs told apart": called(rows), "pairs whose step is told apart": called(rows, only="step ")}
    every = [held(a, b) for a, b in itertools.combinations(runs, 2)]
    ratios |= {"any two runs told apart": called(every), "least change": ratio([row["least_change"] for row in rows])}
    print(write("aa_pairs", f"python -m benchmarks.aa_pairs {' '.join(sys.argv[1:])}", rows, ratios))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:3]))
