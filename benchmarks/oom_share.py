"""How many trials of a search run out of memory, in a space where many points would.

    python -m benchmarks.oom_share [FOLDER] [BUDGET] [PIXELS]

Three image sizes, four micro batches and checkpointing on and off of the mid-size model: 24 points, of which the fast
ones need most memory. The limit is real: `RLIMIT_AS`, set on the process that searches and so on all its trials. It is
the address space that the point `MIDDLE` takes, which is measured first, without a limit. Then every point is run for
a step under it by the search's own runner, which tells how many run out; and one search is run under it. `FOLDER` keeps
the limit, a line a point, and the search: what is there is not done again.

A trial counts as run out where its status is `oom`, whatever it was run for: races and worst cases, too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import binomtest

from benchmarks.midsize import midsize_config
from benchmarks.result import CONFIDENCE, write
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import detect
from grpo_autotune.knobs import Knobs, with_knobs
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialSpec
from grpo_autotune.search.folder import SearchFolder, load_search
from grpo_autotune.search.space import points, space
from grpo_autotune.search.study import name_of
from grpo_autotune.search.trial_log import plain
from grpo_autotune.trials.parent.runner import Runner

BUDGET = "4m"
PIXELS = 448
SIZES = (1.0, 0.75, 0.5)
MICRO_BATCHES = (1, 4, 8, 16)
COMPLETIONS = 16
MIDDLE = {"grpo.per_device_train_batch_size": 8, "grpo.gradient_checkpointing": False}
"""At the user's own image size, three quarters of the largest side: what needs more than this point does not fit."""
LEAST_OF_POINTS, MOST_OF_TRIALS = 0.30, 0.10
LEAST_TRIALS = 12
LIMIT_S = 300.0
POINTS_FILE = "points.jsonl"


def main() -> int:
    """Find the limit, run points and search, write `docs/benchmarks/oom_share.json`; 1 where a bar is missed."""
    if sys.argv[1:2] == ["--points"]:
        run_points(Path(sys.argv[2]))
        return 0
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/oom_share")
    budget = sys.argv[2] if len(sys.argv) > 2 else BUDGET
    pixels = int(sys.argv[3]) if len(sys.argv) > 3 else PIXELS
    folder.mkdir(parents=True, exist_ok=True)
    config = space_config(pixels)
    limit = limit_bytes(folder, config)
    truth = every_point(folder, config, limit)
    found = searched(folder, budget, limit)
    trials = [{"what": "trial", **row.model_dump(exclude={"score"})} for row in found.trials]
    ratios = {"points_that_run_out": share(truth), "trials_that_ran_out": share(trials)}
    setting = {
        "what": "setting",
        "limit_address_bytes": limit,
        "limit_held_bytes": found.memory_limit_bytes,
        "pixels": pixels,
        "budget_s": found.budget_s,
        "elapsed_s": found.elapsed_s,
        "ended": found.ended,
        "speedup": found.best.speedup,
    }
    command = f"python -m benchmarks.oom_share {folder} {budget} {pixels}"
    path = write("oom_share", command, [setting, *({"what": "point", **row} for row in truth), *trials], ratios)
    sys.stdout.write(f"{path}\n")
    return judge(found, ratios)


def space_config(pixels: int) -> RunConfig:
    """The mid-size model with the knobs that memory depends on most, and no others."""
    grpo = {"gradient_accumulation_steps": COMPLETIONS, "gradient_checkpointing": True, "eval_strategy": "no"}
    base = midsize_config("14m", pixels=pixels, completion=32, grpo=grpo).to_dict()
    base["data"] = {key: value for key, value in base["data"].items() if not key.startswith(("eval", "max_eval"))}
    base["data"]["image_size"] = _side(SIZES[1], pixels)
    knobs = {
        "data.image_size": [_side(part, pixels) for part in SIZES],
        "grpo.per_device_train_batch_size": list(MICRO_BATCHES),
        "grpo.gradient_checkpointing": [True, False],
        "grpo.num_generations": None,
        "grpo.dataloader_num_workers": None,
        "model.attn_implementation": None,
        "speedups": None,
    }
    return RunConfig.from_dict({**base, "search": {"knobs": knobs, "accept": ["data.image_size"]}})


def limit_bytes(folder: Path, config: RunConfig) -> int:
    """The address space that the middle point takes, start to end."""
    path = folder / "limit.json"
    if not path.is_file():
        knobs = {**MIDDLE, "data.image_size": config.data.image_size}
        with Runner(folder / "middle") as runner:
            outcome = runner.run(_spec(config, knobs, 0))
            assert outcome.status == "ok", outcome.why
            limit = max(_mapped_bytes())  # its worker waits for another trial
        path.write_text(json.dumps({"limit_bytes": limit, "peak_bytes": outcome.peak_bytes}))
    return int(json.loads(path.read_text())["limit_bytes"])


def every_point(folder: Path, config: RunConfig, limit: int) -> list[dict[str, Any]]:
    """A line for each point: how it ended under the limit."""
    (folder / "own.yaml").write_text(config.to_yaml(), encoding="utf-8")
    words = [sys.executable, "-m", "benchmarks.oom_share", "--points", str(folder)]
    subprocess.run(words, check=True, preexec_fn=_under(limit))
    return _lines(folder)


def run_points(folder: Path) -> None:
    """Run the points that have no line yet, under the limit that this process was given."""
    config, machine = RunConfig.from_yaml((folder / "own.yaml").read_text()), detect()
    done = {name_of(row["knobs"]) for row in _lines(folder)}
    with Runner(folder) as runner:
        for number, knobs in enumerate(points(space(config, machine), config, machine)):
            if name_of(knobs) in done:
                continue
            outcome = runner.run(_spec(config, knobs, number))
            kept = {"status", "why", "peak_bytes", "idle_bytes", "most_bytes", "elapsed_s", "warm"}
            row = {"knobs": knobs, **outcome.model_dump(include=kept)}
            with (folder / POINTS_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{number}: {list(knobs.values())} {outcome.status}, {outcome.elapsed_s:.1f} s\n")


def searched(folder: Path, budget: str, limit: int) -> SearchReport:
    """The report of the search under the limit: of the one that is there, or of one that is run now."""
    place = SearchFolder(folder / "search")
    if not place.report.is_file() or load_search(place.path).ended == "interrupted":
        words = [sys.executable, "-m", "grpo_autotune", "search", str(folder / "own.yaml"), "--budget", budget]
        words += ["--run-dir", str(place.path), *(["--resume"] if place.state_file.is_file() else [])]
        subprocess.run(words, check=True, stdout=sys.stderr, preexec_fn=_under(limit))
    return load_search(place.path)


def share(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Part of the rows that ran out of memory, with its exact binomial interval."""
    count = sum(row["status"] == "oom" for row in rows)
    interval = binomtest(count, len(rows)).proportion_ci(CONFIDENCE, method="exact")
    return {"median": count / len(rows), "low": interval.low, "high": interval.high, "n": len(rows)}


def judge(found: SearchReport, ratios: dict[str, dict[str, float]]) -> int:
    """Print each bar and whether it holds; 1 where one does not."""
    of_points, of_trials = (ratios[name]["median"] for name in ("points_that_run_out", "trials_that_ran_out"))
    bars = [
        (of_points >= LEAST_OF_POINTS, f"{of_points:.0%} of the points run out; at least {LEAST_OF_POINTS:.0%}"),
        (of_trials <= MOST_OF_TRIALS, f"{of_trials:.0%} of the trials ran out; at most {MOST_OF_TRIALS:.0%}"),
        (len(found.trials) >= LEAST_TRIALS, f"{len(found.trials)} trials; at least {LEAST_TRIALS}"),
    ]
    for holds, words in bars:
        sys.stdout.write(f"{'holds ' if holds else 'MISSED'} {words}\n")
    return 0 if all(holds for holds, _ in bars) else 1


def _spec(config: RunConfig, knobs: Knobs, number: int) -> TrialSpec:
    values = plain(with_knobs(config, knobs))
    return TrialSpec(number=number, config=values, knobs=knobs, steps=1, warmup=0, limit_s=LIMIT_S)


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / POINTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _under(limit: int) -> Callable[[], None]:
    """What a child does first: take the limit, which its own children inherit."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _side(part: float, pixels: int) -> int:
    return int(part * pixels) // 32 * 32


def _mapped_bytes() -> Iterator[int]:
    """Address space that each child of this process has had at most."""
    for child in psutil.Process().children(recursive=True):
        for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
            if line.startswith("VmPeak"):
                yield int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
