"""Two workers on a core each against one: trials per minute, and whether the search ends with the same winner.

    python -m benchmarks.search_workers [FOLDER] [SEARCHES]

Each of so many searches, with a seed of its own, runs twice: by one worker on one core, and by two workers on a core
each, all processes of one thread. Counted are the trials that workers share, by the times at which files were written:
over the time from the search's begin to the last of them; from the end of its probe; and without each worker's first
trial. `FOLDER` keeps the searches: one that is there is not run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.config.schema import load_config
from grpo_autotune.records.search import SearchReport
from grpo_autotune.search.folder import SearchFolder, load_search

BUDGET_S = 180
SEARCHES = 5
WAYS = {"one worker": (1, "1"), "two workers": (2, "2")}
"""Way of searching -> cores that are open to it, and `--workers`."""
OVERRIDES = [
    "grpo.eval_strategy=no", "grpo.eval_on_start=false", "grpo.per_device_train_batch_size=4",
    "grpo.gradient_accumulation_steps=8", "grpo.gradient_checkpointing=true", "grpo.save_strategy=no",
    "search.knobs={grpo.per_device_train_batch_size: [4, 8, 16, 32], grpo.gradient_checkpointing: [true, false], "
    "speedups: [none, auto], model.attn_implementation: [eager, sdpa], data.image_size: null, "
    "grpo.num_generations: null, grpo.dataloader_num_workers: null}",
]  # fmt: skip
MIDDLE = ("models", "sampler", "again")
"""Sources of the trials that workers share."""


def main() -> None:
    """Run the searches and write `docs/benchmarks/search_workers.json`."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/search_workers")
    count = int(sys.argv[2]) if len(sys.argv) > 2 else SEARCHES
    rows = [_searched(folder, seed, way) for seed in range(count) for way in WAYS]
    by = {(row["seed"], row["way"]): row for row in rows}
    pairs = [(by[seed, "one worker"], by[seed, "two workers"]) for seed in range(count)]

    def over(rate: str) -> dict[str, float]:
        return ratio([two[rate] / one[rate] for one, two in pairs])

    same = [one["winner"] == two["winner"] for one, two in pairs]
    ratios = {
        "trials per minute of two workers over one": over("trials_per_minute"),
        "trials per minute of two workers over one, with start and probe": over("whole_trials_per_minute"),
        "trials per minute of two workers over one, once they have begun": over("begun_trials_per_minute"),
        "same winner": {"median": sum(same) / count, "low": min(same), "high": max(same), "n": count},
    }
    path = write("search_workers", f"python -m benchmarks.search_workers {folder} {count}", rows, ratios)
    sys.stdout.write(f"{ratios}\n{path}\n")


def _searched(folder: Path, seed: int, way: str) -> dict[str, Any]:
    cores, workers = WAYS[way]
    place = SearchFolder(folder / f"{seed}-{way.replace(' ', '-')}")
    if not place.report.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{seed}.yaml"
        own.write_text(load_config("demo", [*OVERRIDES, f"search.seed={seed}"]).to_yaml(), encoding="utf-8")
        words = ["-m", "grpo_autotune", "search", str(own), "--budget", f"{BUDGET_S}s", "--workers", workers]
        first, environment = set(sorted(os.sched_getaffinity(0))[:cores]), os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *words, "--run-dir", str(place.path)],
            check=True, stdout=sys.stderr, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, first),
        )  # fmt: skip
    report = load_search(place.path)
    trials = [row for row in report.trials if row.source in MIDDLE and row.purpose == "timed"]
    firsts = {row.place: row.number for row in reversed(trials)}
    later = [row for row in trials if row.number != firsts[row.place]]
    begun, ended = _time(place.config), max(_time(place.trial(row.number) / "outcome.json") for row in trials)
    probed = _time(place.trial(report.trials[0].number) / "outcome.json")
    later_begun = min(_time(place.trial(row.number) / "spec.json") for row in later)
    return {
        "seed": seed, "way": way, "trials": len(trials), "minutes": (ended - begun) / 60.0,
        "trials_per_minute": 60.0 * len(trials) / (ended - probed),
        "whole_trials_per_minute": 60.0 * len(trials) / (ended - begun),
        "begun_trials_per_minute": 60.0 * len(later) / (ended - later_begun),
        "winner": report.best.changed,
        "speedup": report.best.speedup, "ci": report.best.ci, "raced": report.best.raced,
        "own_step_s": report.baseline.step_s, "elapsed_s": report.elapsed_s, "others": _others(report),
        "notes": [note for note in report.notes if note.startswith("Worker")],
    }  # fmt: skip


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _others(report: SearchReport) -> float | None:
    return None if report.others is None else report.others.cores


if __name__ == "__main__":
    main()
