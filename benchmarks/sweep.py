"""Every point of a space, measured: what a search can be held against.

    python -m benchmarks.sweep [FOLDER] [PIXELS] [STEPS]

224 legal combinations of five knobs on the 16 M-parameter Qwen3-VL, each a trial of the search's own runner with the
search's own completion lengths. One JSON line a point goes to `FOLDER/rows.jsonl` as it is measured, so that a second
run goes on where the first was stopped. At the end `docs/benchmarks/sweep.json` holds the rows, and
`sweep_records.json.gz` beside it what a search's models would learn from each.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.midsize import midsize_config
from benchmarks.result import FOLDER, write
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import detect
from grpo_autotune.knobs import with_knobs
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.evaluator import completion_lengths
from grpo_autotune.search.space import points, space
from grpo_autotune.search.study import name_of
from grpo_autotune.search.trial_log import plain
from grpo_autotune.trials.parent.runner import Runner

RECORDS = FOLDER / "sweep_records.json.gz"
LIMIT_S = 600.0
SMALLEST = 256
"""Pixels a side: what Qwen3-VL's processor enlarges anything smaller to."""


def sweep_config(pixels: int) -> RunConfig:
    """The mid-size model's configuration with the space of the sweep: image sizes in steps of 32 pixels, four micro
    batches, checkpointing, attention kernel and speed-ups."""
    base = midsize_config("14m", pixels=pixels, completion=16).to_dict()
    base["data"]["image_size"] = pixels
    knobs = {
        "data.image_size": list(range(pixels, SMALLEST - 1, -32)),
        "grpo.per_device_train_batch_size": [1, 2, 4, 8],
        "grpo.gradient_checkpointing": [True, False],
        "model.attn_implementation": ["sdpa", "eager"],
        "speedups": ["none", "auto"],
        "grpo.num_generations": None,
        "grpo.dataloader_num_workers": None,
    }
    base["model"]["attn_implementation"] = "sdpa"
    base["grpo"] = {**base["grpo"], "gradient_checkpointing": True, "eval_strategy": "no"}
    base["data"] = {key: value for key, value in base["data"].items() if not key.startswith(("eval", "max_eval"))}
    return RunConfig.from_dict({**base, "search": {"knobs": knobs, "accept": ["data.image_size"]}})


def slim(record: ProbeRecord) -> dict[str, Any]:
    """A record without what models do not read."""
    values = record.model_dump(mode="json", exclude={"utilisation", "startup", "versions", "ranks"})
    for stage in values["timings"]["stages"]:
        stage["seams"] = []
    return values


def measure(folder: Path, config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Probe, then every point that has no line yet; returns all lines, the probe's first."""
    path, machine = folder / "rows.jsonl", detect()
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with Runner(folder) as runner:
        if not rows:
            spec = TrialSpec(number=0, purpose="probe", config=plain(config), steps=4, limit_s=LIMIT_S)
            rows.append(_line(path, None, runner.run(spec)))
        record = ProbeRecord.model_validate(rows[0]["record"])
        done = {name_of(row["knobs"]) for row in rows[1:]}
        found = list(points(space(config, machine, record), config, machine))
        for knobs in found:
            if name_of(knobs) in done:
                continue
            spec = TrialSpec(
                number=len(rows),
                config=plain(with_knobs(config, knobs)),
                knobs=knobs,
                steps=steps,
                limit_s=LIMIT_S,
                completion_lengths=completion_lengths(record),
                seen_lengths=rows[0].get("lengths", []),
            )
            rows.append(_line(path, knobs, runner.run(spec)))
            took = rows[-1]["elapsed_s"]
            print(f"{len(rows) - 1} of {len(found)}: {knobs} {rows[-1]['status']}, {took:.1f} s", flush=True)
    return rows


def _line(path: Path, knobs: dict[str, Any] | None, outcome: TrialOutcome) -> dict[str, Any]:
    row = {
        "knobs": knobs,
        "status": outcome.status,
        "why": outcome.why,
        "step_s": outcome.step_s,
        "peak_bytes": outcome.peak_bytes,
        "idle_bytes": outcome.idle_bytes,
        "elapsed_s": outcome.elapsed_s,
        "warm": outcome.warm,
        "lengths": outcome.lengths,
        "record": None if outcome.record is None else slim(outcome.record),
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def main() -> None:
    """Measure and write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sweep")
    pixels = int(sys.argv[2]) if len(sys.argv) > 2 else 448
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    folder.mkdir(parents=True, exist_ok=True)
    config = sweep_config(pixels)
    rows = measure(folder, config, steps)
    with gzip.open(RECORDS, "wt") as file:
        json.dump({"config": config.to_dict(), "rows": rows}, file)
    shown = [{key: value for key, value in row.items() if key != "record"} for row in rows[1:]]
    path = write("sweep", f"python -m benchmarks.sweep {folder} {pixels} {steps}", shown, {})
    took = sum(row["elapsed_s"] for row in shown)
    best = min((statistics.median(row["step_s"]) for row in shown if row["status"] == "ok"), default=0.0)
    print(f"{len(shown)} points in {took / 60:.0f} min; the fastest step takes {best:.2f} s: {path}")


if __name__ == "__main__":
    main()
