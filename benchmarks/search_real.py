"""Searches of twelve minutes on a real language model, alone on the machine or beside a busy process; do they hold?

    python -m benchmarks.search_real [FOLDER] [--seeds 0 1 2] [--busy] [--name search_real]

Each seed searches from SmolLM2-135M at micro batches of two, with gradient checkpointing and no speed-ups, and then
probes 20 steps of its `tuned.yaml`, in two parts, before, between and after which it probes the user's configuration
again. Their seconds, brought to the mean share of completions that they train on, are held against the receipt's for
that share (`receipt_s`), as they are and divided by `pace`: the seconds of the user's configuration meanwhile over
those in the search's races, from which the receipt comes. Their two halves tell by how much one configuration differs
from itself, and `completion_tokens` what answers were like in the search's probe and afterwards, when training has made
them shorter or longer. With `--busy` another process keeps the last core busy all the while. `FOLDER` keeps searches
and probes: what is there is not run again. Needs `examples/smollm2.py`'s model, a wheel on the package index.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.result import ratio, write
from examples.smollm2 import ROOT, model_folder
from grpo_autotune.config.schema import load_config
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.records.trial import OUTCOME_FILE
from grpo_autotune.report.files import REPORT_FILE
from grpo_autotune.search.folder import SearchFolder, load_search
from grpo_autotune.train.runs.receipt_check import typical

BUDGET = "12m"
STEPS = {"own": 3, "tuned": 10}
TURNS = ("own", "tuned", "own", "tuned", "own")
"""Probes afterwards, and the steps of each."""
OVERRIDES = [
    "grpo.per_device_train_batch_size=2", "grpo.gradient_accumulation_steps=8", "grpo.gradient_checkpointing=true",
    "grpo.max_completion_length=16", "grpo.eval_steps=50", "grpo.max_steps=400", "speedups=none",
]  # fmt: skip
LOOP = "while True:\n    sum(range(1_000_000))"


def main() -> None:
    """Search once a seed, and write the JSON after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/search_real"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--name", default="search_real")
    asked = parser.parse_args()
    model_folder()
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in asked.seeds:
        with busy_core() if asked.busy else _nothing():
            rows.append(_searched(asked.folder / str(seed), seed))
        ratios = {
            "probe afterwards over receipt": ratio([row["afterwards_s"] / row["receipt_s"] for row in rows]),
            "the same at the pace of the user's configuration": ratio(
                [row["afterwards_s"] / row["receipt_s"] / row["pace"] for row in rows]
            ),
            "second half afterwards over first": ratio([row["halves"][1] / row["halves"][0] for row in rows]),
            "speedup": ratio([row["speedup"] for row in rows]),
            "model error, median": ratio([row["model_error"]["step"]["median"] for row in rows]),
            "model error, p90": ratio([row["model_error"]["step"]["p90"] for row in rows]),
        }
        path = write(asked.name, " ".join(["python -m benchmarks.search_real", *sys.argv[1:]]), rows, ratios)
        sys.stdout.write(f"{ratios}\n{path}\n")


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that keeps the last core busy meanwhile."""
    last = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", LOOP], preexec_fn=lambda: os.sched_setaffinity(0, {last})) as other:
        try:
            yield
        finally:
            other.kill()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _searched(folder: Path, seed: int) -> dict[str, Any]:
    place, tuned, after = SearchFolder(folder / "search"), folder / "tuned.yaml", folder / "afterwards"
    folder.mkdir(exist_ok=True)
    if not place.report.is_file():
        own = folder / "own.yaml"
        own.write_text(
            load_config(str(ROOT / "examples/arithmetic.yaml"), [*OVERRIDES, f"search.seed={seed}"]).to_yaml()
        )
        _told(["search", str(own), "--budget", BUDGET, "--run-dir", str(place.path), "--out", str(tuned)])
    probes: dict[str, list[dict[str, Any]]] = {"own": [], "tuned": []}
    for number, which in enumerate(TURNS):
        out = after / f"{number}-{which}"
        if not (out / REPORT_FILE).is_file():
            _told(["probe", str(folder / f"{which}.yaml"), "--steps", str(STEPS[which]), "--out", str(out)])
        probes[which].append(json.loads((out / REPORT_FILE).read_text()))
    report = load_search(place.path)
    best, receipt = report.best, load_config(str(tuned)).receipt
    assert receipt is not None
    first = json.loads((place.trial(0) / OUTCOME_FILE).read_text())["record"]
    halves = [(probed["step_seconds"], probed.get("living_shares", [])) for probed in probes["tuned"]]
    steps_s, shares = ([value for half in halves for value in half[of]] for of in (0, 1))
    share, slope_s = mean(shares) if shares else None, best.living_s or 0.0
    own_steps_s = [seconds for probed in probes["own"] for seconds in probed["step_seconds"]]
    raced = [row.number for row in report.trials if row.source == "race" and row.knobs == report.baseline.knobs]
    raced_s = [s for number in raced for s in json.loads((place.trial(number) / OUTCOME_FILE).read_text())["step_s"]]
    return {
        "seed": seed, "winner": best.changed, "raced": best.raced, "speedup": best.speedup, "ci": best.ci,
        "step_s": best.step_s, "step_s_ci": best.step_s_ci, "living_share": best.living_share,
        "living_s": best.living_s, "receipt_s": receipt.step_s if share is None else receipt.seconds_at(share),
        "afterwards_s": typical(steps_s, 1, shares, slope_s), "halves": [half_of(*one, receipt) for one in halves],
        "living_share_afterwards": share, "steps_afterwards_s": steps_s, "living_shares_afterwards": shares,
        "own_afterwards_s": own_steps_s, "own_raced_s": raced_s, "pace": median(own_steps_s) / median(raced_s),
        "own_step_s": report.baseline.step_s, "trials": len(report.trials), "ended": report.why_ended,
        "contributions": [one.model_dump(mode="json") for one in report.contributions],
        "model_error": {name: one.model_dump() for name, one in report.model_error.items()},
        "others_cores": report.others and report.others.cores, "notes": report.notes, "elapsed_s": report.elapsed_s,
        "others_cores_afterwards": [probed["others"] and probed["others"]["cores"] for probed in probes["tuned"]],
        "threads": [receipt.runtime.get("threads"), *(probed["runtime"].get("threads") for probed in probes["tuned"])],
        "completion_tokens": [tokens_of(first), *map(tokens_of, probes["tuned"])],
    }  # fmt: skip


def tokens_of(measured: dict[str, Any]) -> float:
    """Mean tokens of a completion."""
    return float(measured["tokens"]["completion"]["mean"])


def half_of(steps_s: list[float], shares: list[float], receipt: Receipt) -> float:
    """Seconds of some steps over the receipt's for their share."""
    expected_s = receipt.seconds_at(mean(shares)) if shares else receipt.step_s
    return typical(steps_s, 1, shares, receipt.living_s or 0.0) / expected_s


def _told(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "grpo_autotune", *words], check=True, stdout=sys.stderr, cwd=ROOT)


if __name__ == "__main__":
    main()
