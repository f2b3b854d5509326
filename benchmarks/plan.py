"""How far off a plan is: seconds per sample that it predicts at values that were not probed, against a measurement.

    python -m benchmarks.plan [FOLDER]

Two cases: the demo, and the model of 14 million parameters at 768 pixels. In each the configuration and three others
(two image sizes, one group size) run a block of steps each in turn, so that the machine's load falls on all alike; the
plan knows the first alone. `FOLDER` keeps the outcomes.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.midsize import midsize_config
from benchmarks.result import ratio, write
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.hardware import detect
from grpo_autotune.knobs import Knobs, with_knobs
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import groups_per_step
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.report.plan import Basis, plan_of
from grpo_autotune.trials.parent.runner import Runner

CASES: dict[str, tuple[Knobs, ...]] = {
    "demo": ({"data.image_size": 64}, {"data.image_size": 32}, {"grpo.num_generations": 4}),
    "midsize": ({"data.image_size": 512}, {"data.image_size": 384}, {"grpo.num_generations": 4}),
}
BLOCKS, DEADLINE_S = {"demo": (2, 15), "midsize": (1, 6)}, 1500.0  # steps of a block, and rounds


def main() -> None:
    """Measure what is not there yet, plan, compare, and write `docs/benchmarks/plan.json`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path([*sys.argv[1:], scratch][0])
        rows = [row for case in CASES for row in compared(case, folder / case)]
    path = write("plan", "python -m benchmarks.plan", rows, {"error": ratio([row["error"] for row in rows])})
    sys.stdout.write("".join(f"{row}\n" for row in rows) + f"{path}\n")


def base_config(case: str) -> RunConfig:
    """The configuration that is probed; completions of the mid-size model all have one length."""
    if case == "demo":
        return load_config("demo", ["grpo.eval_strategy=no", "grpo.eval_on_start=false", "grpo.max_steps=1000"])
    grpo = {"generation_kwargs": {"min_new_tokens": 48}, "eval_strategy": "no", "max_steps": 1000}
    return midsize_config("14m", pixels=768, completion=48, grpo=grpo)


def compared(case: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each value that was not probed: seconds per sample as planned, and as measured at the probe's pace."""
    config = base_config(case)
    configs = [config, *(with_knobs(config, knobs) for knobs in CASES[case])]
    own, *others = measured(case, configs, folder)
    assert own.record is not None
    plan = plan_of(Basis(Models.from_probe(config, own.record, detect(), own), case), datetime.now())
    rows = []
    for knobs, changed, outcome in zip(CASES[case], configs[1:], others, strict=True):
        told = next(row for rows in plan.tables.values() for row in rows if row.knobs == knobs).sample_s
        ratio_to_own = median(a / b for a, b in zip(outcome.step_s, own.step_s, strict=True))  # each round at one pace
        took_s = ratio_to_own * plan.step_s.value / groups_per_step(changed)
        row = {"case": case, "knobs": knobs, "predicted": told.value, "low": told.low, "high": told.high}
        row |= {"measured": took_s, "error": abs(told.value / took_s - 1.0)}
        rows.append(row | {"inside": told.low <= took_s <= told.high})
    return rows


def measured(case: str, configs: list[RunConfig], folder: Path) -> list[TrialOutcome]:
    """The outcomes of the configurations in turns; seconds of a step are a block's mean."""
    files = [folder / f"{number}.json" for number in range(len(configs))]
    if not all(file.is_file() for file in files):
        steps, rounds = BLOCKS[case]
        size = {"steps": steps, "warmup": steps, "limit_s": DEADLINE_S}
        specs = [TrialSpec(number=n, config=one.to_dict(), **size) for n, one in enumerate(configs)]
        with Runner(folder) as runner:
            raced = runner.race(specs, rounds=rounds, deadline_s=DEADLINE_S)
        for file, outcome in zip(files, raced, strict=True):
            assert outcome.status == "ok", outcome.why
            file.write_text(outcome.model_dump_json())
    return [TrialOutcome.model_validate_json(file.read_bytes()) for file in files]


if __name__ == "__main__":
    main()
