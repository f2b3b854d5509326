"""Sped-up optimizer steps of this tree against those of another commit, in turns.

    python -m benchmarks.against COMMIT [--cases 768px text ...] [--rounds 8] [--checkpointing on] [--limit 500]

Each tree runs in a process of its own, the other commit's in a worktree that is gone afterwards, on one torch thread.
A round has both train one step of every case of `benchmarks.speedups`, one while the other waits, the short ones
several times; which goes first turns from step to step of a case (A B B A). The first warms up. No round begins after
`limit` seconds. A ratio is that of the other commit's seconds to this tree's in the same turn: above 1 this tree
is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write

ROOT = Path(__file__).parent.parent
CASES = ("768px", "448px", "768px-256", "text", "short", "long")
DEFAULT = CASES[:-1]
REPEATS = {"short": 4}
"""Steps of a case in one round, where one is too short to tell much."""
STAGES = ("step", "log-probs and backward", "generation")

CHILD = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from benchmarks import speedups
import grpo_autotune, torch
torch.set_num_threads(1)
variants = {}
print(os.path.dirname(grpo_autotune.__file__), file=answers, flush=True)
for line in sys.stdin:
    case, checkpointing, number = json.loads(line)
    if case not in variants:
        config = speedups.config_of(speedups.CASES[case], "14m", checkpointing)
        variants[case] = speedups.Variant("all", config)
    print(json.dumps(variants[case].step(number)), file=answers, flush=True)
"""
"""Runs inside either tree, on what both have."""


class Tree:
    """A process that makes steps with the code of one folder."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if Path(self._answer()) != folder / "grpo_autotune":
            raise RuntimeError(f"the process in {folder} took grpo_autotune from elsewhere")

    def step(self, case: str, checkpointing: bool, number: int) -> dict[str, float]:
        """Seconds of an optimizer step, whole and by stage."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([case, checkpointing, number]) + "\n")
        self._process.stdin.flush()
        seconds: dict[str, float] = json.loads(self._answer())
        return seconds

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with exit code {self._process.wait()}")
        return line.rstrip("\n")

    def end(self) -> None:
        """End the process; nothing of it is kept."""
        self._process.kill()
        self._process.wait()


@contextmanager
def trees(commit: str) -> Iterator[dict[str, Tree]]:
    """A process for the commit, in a worktree, and one for this tree, by name."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder).resolve() / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), commit], cwd=ROOT, check=True)
        started: dict[str, Tree] = {}
        try:
            for name, place in ((commit, other), ("now", ROOT)):
                started[name] = Tree(place)
            yield started
        finally:
            for tree in started.values():
                tree.end()
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)


def rounds(by_name: dict[str, Tree], options: argparse.Namespace, end_s: float) -> Iterator[dict[str, Any]]:
    """A row for each step after the warm-up, of all cases in turn."""
    order, numbers = list(by_name), dict.fromkeys(options.cases, 0)
    for turn in range(options.rounds + 1):
        if turn > 1 and time.monotonic() > end_s:
            break
        for case in [name for name in options.cases for _ in range(REPEATS.get(name, 1) if turn else 1)]:
            for name in order if numbers[case] % 2 else order[::-1]:
                seconds = by_name[name].step(case, options.checkpointing == "on", numbers[case])
                if turn:
                    yield {"case": case, "round": numbers[case], "tree": name, **seconds}
            numbers[case] += 1


def ratios_of(rows: list[dict[str, Any]], commit: str) -> dict[str, Any]:
    """Seconds of the commit over those of this tree, by case and stage."""
    turns: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        turns.setdefault((row["case"], row["round"]), {})[row["tree"]] = row
    found: dict[str, list[float]] = {}
    for (case, _), sides in turns.items():
        for stage in STAGES:
            name = f"{case}: {stage}, {commit} over now"
            found.setdefault(name, []).append(sides[commit][stage] / sides["now"][stage])
    return {name: ratio(quotients) for name, quotients in found.items()}


def main() -> None:
    """Compare with a commit and write `docs/benchmarks/against.json`."""
    parser = argparse.ArgumentParser(description="Sped-up steps of this tree against another commit's.")
    parser.add_argument("commit")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--checkpointing", choices=["on", "off"], default="on")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds after which no round begins")
    options = parser.parse_args()
    rows, end_s = [], time.monotonic() + options.limit
    with trees(options.commit) as by_name:
        for row in rounds(by_name, options, end_s):
            rows.append(row)
            told = "  ".join(f"{stage} {row[stage]:.2f} s" for stage in STAGES)
            sys.stderr.write(f"{row['case']}, round {row['round']}, {row['tree']}: {told}\n")
    ratios = ratios_of(rows, options.commit)
    write("against", f"python -m benchmarks.{' '.join(['against', *sys.argv[1:]])}", rows, ratios)
    for name, value in ratios.items():
        sys.stdout.write(f"{value['median']:6.2f}  {value['low']:.2f} .. {value['high']:.2f}  {name}\n")


if __name__ == "__main__":
    main()
