"""One real search over the space of the sweep, within a share of the sweep's time: how good is what it ends with?

    python -m benchmarks.search_live [FOLDER] [SHARE]

Seconds a step are those that the sweep measured, for what the search chose as for the best of all points, so that two
days' machines are not compared. `FOLDER` keeps the search: one that is there is not run again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.result import write
from benchmarks.search_replay import SHARES, Sweep
from grpo_autotune.search.folder import SearchFolder, load_search


def main() -> None:
    """Search and write `docs/benchmarks/search_live.json`."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/search_live")
    share = float(sys.argv[2]) if len(sys.argv) > 2 else SHARES[0]
    folder.mkdir(parents=True, exist_ok=True)
    sweep, place = Sweep(), SearchFolder(folder / "search")
    budget_s = round(share * sweep.seconds)
    if not place.report.is_file():
        (folder / "own.yaml").write_text(sweep.config.to_yaml(), encoding="utf-8")
        words = [sys.executable, "-m", "grpo_autotune", "search", str(folder / "own.yaml"), "--budget", f"{budget_s}s"]
        subprocess.run([*words, "--run-dir", str(place.path)], check=True, stdout=sys.stderr)
    found = load_search(place.path)
    of_best = sweep.score(found.best_fast.knobs) / sweep.best
    row = {
        "knobs": found.best_fast.knobs,
        "score_share": of_best,
        "time_share": found.elapsed_s / sweep.seconds,
        "speedup": found.best_fast.speedup,
        "ci": found.best_fast.ci,
        "raced": found.best_fast.raced,
        "trials": len(found.trials),
        "budget_s": found.budget_s,
        "elapsed_s": found.elapsed_s,
    }
    ratios = {"score over the best": {"median": of_best, "low": of_best, "high": of_best, "n": 1}}
    path = write("search_live", f"python -m benchmarks.search_live {folder} {share}", [row], ratios)
    sys.stdout.write(f"{1.0 - of_best:.1%} below the best after {row['time_share']:.1%} of the sweep's time\n{path}\n")


if __name__ == "__main__":
    main()
