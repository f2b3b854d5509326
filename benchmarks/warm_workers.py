"""How many more trials a minute warm workers serve than fresh ones.

    python -m benchmarks.warm_workers [CONFIG] [PAIRS]

Each pair is two trials of one configuration through the search's own runner, one in a worker that has served before and
one in a fresh process; which comes first alternates. A trial is two optimizer steps and one of warm-up, short as the
search's are, and is timed by the parent from the order to the outcome. The ratio is fresh seconds over warm seconds,
pair by pair.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.config.schema import load_config
from grpo_autotune.records.trial import TrialSpec
from grpo_autotune.trials.parent.runner import Runner

PAIRS = 8
OVERRIDES = ["grpo.eval_strategy=no", "grpo.max_steps=100"]


def main() -> None:
    """Run the pairs and write `docs/benchmarks/warm_workers.json`."""
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else "demo", OVERRIDES).to_dict()
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else PAIRS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        kept, fresh = Runner(Path(folder) / "warm"), Runner(Path(folder) / "fresh", warm=False)
        with kept, fresh:
            kept.run(TrialSpec(number=0, config=config, steps=2))  # the worker's first trial is a fresh one
            for pair in range(pairs):
                for runner in (kept, fresh) if pair % 2 == 0 else (fresh, kept):
                    outcome = runner.run(TrialSpec(number=pair + 1, config=config, steps=2))
                    row = {"pair": pair, "warm": outcome.warm, "status": outcome.status, "why": outcome.why}
                    rows.append({**row, "seconds": outcome.elapsed_s, "startup_s": outcome.startup_s})
                    sys.stderr.write(f"{rows[-1]}\n")
    found = {"trials_per_minute_warm_over_fresh": ratio(_ratios(rows))}
    sys.stdout.write(f"{found}\n{write('warm_workers', 'python -m benchmarks.warm_workers', rows, found)}\n")


def _ratios(rows: list[dict[str, Any]]) -> list[float]:
    found = []
    for begin in range(0, len(rows), 2):
        by = {row["warm"]: row["seconds"] for row in rows[begin : begin + 2] if row["status"] == "ok"}
        found.append(by[False] / by[True])
    return found


if __name__ == "__main__":
    main()
