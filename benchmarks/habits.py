"""From the habits of a first script to a tuned file, and whether that file then runs as fast as its receipt says.

    python -m benchmarks.habits [FOLDER] [BUDGET] [PIXELS]

The mid-size model's configuration (768 pixels, micro batch 1, evaluation every five steps, nothing shared) is searched
with the command that a user would type, and `tuned.exact.yaml` is then trained for 50 steps, as it is but for
`max_steps`: evaluation and saving stay where the file has them.

What is compared. A receipt's seconds are the median over steps from the end of one step to the end of the next, as
raced with `tuned.exact.yaml`'s own settings, evaluation included where it falls into the race. The live steps are taken
from the run's own report, which cuts steps at the same place, puts as many aside for warming up, and is read with the
same statistic. A step in five is longer by an evaluation on both sides; `live_step_without_evaluation_over_receipt`
leaves those out. The rest is as training has it: lengths of answers are free, where trials have them fixed.

What is done already in FOLDER is not done again; a search that was cut short goes on.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.midsize import midsize_config
from benchmarks.result import ratio, write
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.report.files import load_report
from grpo_autotune.search.folder import SearchFolder, load_search

STEPS = 50
WARMUP = 1
"""Steps that a trial and the run's report put aside where every step generates, as here."""
LEAST_GAIN = 3.0
TOLERANCE = 0.05
LATE_S = 1.0
"""A search is over within its budget to the second."""


def main() -> int:
    """Search, train, write `docs/benchmarks/habits.json`; 1 where a bar is missed."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/habits")
    budget = sys.argv[2] if len(sys.argv) > 2 else "10m"
    pixels = int(sys.argv[3]) if len(sys.argv) > 3 else 768
    folder.mkdir(parents=True, exist_ok=True)
    found = searched(folder, budget, midsize_config("14m", pixels=pixels))
    tuned = load_config(SearchFolder(folder / "search").tuned("exact"))
    assert tuned.receipt is not None
    live = trained(folder)
    rows = rows_of_live(live, tuned)
    gain, receipt = found.best_exact, tuned.receipt
    ratios = {
        "useful_completions_exact_over_own": {
            "median": gain.speedup, "low": gain.ci[0], "high": gain.ci[1], "n": gain.steps,
        },
        "live_step_over_receipt": over(rows, receipt.step_s),
        "live_step_without_evaluation_over_receipt": over(
            [row for row in rows if not row["evaluates"]], receipt.step_s
        ),
    }  # fmt: skip
    command = f"python -m benchmarks.habits {folder} {budget} {pixels}"
    path = write("habits", command, [row_of_search(found), row_of_receipt(receipt), *rows], ratios)
    sys.stdout.write(f"{path}\n")
    return judge(found, ratios)


def searched(folder: Path, budget: str, config: RunConfig) -> SearchReport:
    """The search's report: of the one that is there, or of one that is run now."""
    place = SearchFolder(folder / "search")
    if not _finished(place):
        yaml = folder / "own.yaml"
        yaml.write_text(config.to_yaml(), encoding="utf-8")
        words = ["search", str(yaml), "--budget", budget, "--run-dir", str(place.path)]
        words += ["--out", str(folder / "tuned.yaml"), *(["--resume"] if place.state_file.is_file() else [])]
        (folder / "search.txt").write_text(_grpo_autotune(words), encoding="utf-8")
    return load_search(place.path)


def trained(folder: Path) -> Report:
    """The report of `STEPS` measured steps of the tuned file, after those that a trial puts aside, too."""
    out = folder / "train"
    if not (out / "report.json").is_file():
        shutil.rmtree(out, ignore_errors=True)  # of one that was cut short: its first steps are slow again
        yaml = SearchFolder(folder / "search").tuned("exact")
        _grpo_autotune(["train", str(yaml), "--out", str(out), "--set", f"grpo.max_steps={WARMUP + STEPS}"])
    return load_report(out)


def rows_of_live(live: Report, tuned: RunConfig) -> list[dict[str, Any]]:
    """A row for each live step."""
    every = int(tuned.grpo["eval_steps"])
    return [
        {"what": "live", "step": step, "step_s": seconds, "evaluates": step % every == 0}
        for step, seconds in zip(live.steps, live.step_seconds, strict=True)
    ]


def row_of_search(found: SearchReport) -> dict[str, Any]:
    """What the search found with exact knobs alone, and when it ended."""
    best = found.best_exact
    return {
        "what": "search",
        "changed": best.changed,
        "speedup": best.speedup,
        "ci": best.ci,
        "confidence": found.confidence,
        "raced": best.raced,
        "worst_case": best.worst_case,
        "own_step_s": best.baseline_step_s,
        "step_s": best.step_s,
        "trials": len(found.trials),
        "ended": found.ended,
        "budget_s": found.budget_s,
        "elapsed_s": found.elapsed_s,
    }


def row_of_receipt(receipt: Receipt) -> dict[str, Any]:
    """What `tuned.exact.yaml` claims."""
    kept = ("step_s", "step_s_low", "step_s_high", "steps", "predicted_step_s", "raced", "peak_bytes")
    return {"what": "receipt", **receipt.model_dump(include=set(kept))}


def over(rows: list[dict[str, Any]], receipt_s: float) -> dict[str, float]:
    """Median live step over the receipt's, with its bootstrap interval."""
    return ratio([row["step_s"] / receipt_s for row in rows])


def judge(found: SearchReport, ratios: dict[str, dict[str, float]]) -> int:
    """Print each bar and whether it holds; 1 where one does not."""
    gain, live = ratios["useful_completions_exact_over_own"], ratios["live_step_over_receipt"]
    raced = "raced" if found.best_exact.raced else "NOT raced"
    bars = [
        (
            gain["median"] >= LEAST_GAIN and found.best_exact.raced,
            f"useful completions a second with exact knobs alone: x {gain['median']:.2f} "
            f"({gain['low']:.2f} to {gain['high']:.2f}, {raced}); at least {LEAST_GAIN:g}",
        ),
        (
            abs(live["median"] - 1.0) <= TOLERANCE,
            f"live step over the receipt's: {live['median']:.3f} ({live['low']:.3f} to {live['high']:.3f}, "
            f"{live['n']} steps); within {TOLERANCE:.0%}",
        ),
        (
            found.elapsed_s <= found.budget_s + LATE_S,
            f"the search took {found.elapsed_s:.1f} s of {found.budget_s:.0f} s",
        ),
    ]
    for holds, words in bars:
        sys.stdout.write(f"{'holds ' if holds else 'MISSED'} {words}\n")
    return 0 if all(holds for holds, _ in bars) else 1


def _finished(place: SearchFolder) -> bool:
    return place.report.is_file() and load_search(place.path).ended != "interrupted"


def _grpo_autotune(words: list[str]) -> str:
    """Run a command; what it prints, progress going to standard error."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "grpo_autotune", *words]
    found = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if found.returncode:  # it has said why
        sys.exit(f"{' '.join(command)} ended with {found.returncode}")
    sys.stderr.write(f"{' '.join(words[:2])}: {time.monotonic() - begun:.0f} s\n")
    return found.stdout


if __name__ == "__main__":
    sys.exit(main())
