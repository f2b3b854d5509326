"""Two objectives in one run: does each branch's KL end inside its band, and where does it end without the controller?

    python -m benchmarks.branches [SEEDS]

A tiny text model (two layers, random weights) is rewarded for an answer of full length in the rows of one branch, as
most are, and for a quarter of all tokens in the rows of the other, which pulls it away. Each seed trains twice from the
same weights, with the controller and without (`control: null`). A branch's KL at the end is its mean over the last 20
steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

from grpo_autotune.config.schema import RunConfig  # noqa: E402
from grpo_autotune.train.trainer import build_trainer  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402

SEEDS, STEPS, LAST, LENGTH = 5, 90, 20, 4
RATE, BETA = 1e-2, 0.1
BANDS = {"calm": [0.02, 0.06], "pulled": [0.08, 0.15]}
TEXTS = {"calm": "Which digit is shown? How many are there?", "pulled": "left right red green blue yes no"}
CONTROL = {"every": 4, "factor": 0.75}


def calm(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 for an answer of full length, which most are."""
    return [float(len(ids) == LENGTH) for ids in completion_ids]


def pull(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of tokens of one residue: a model that gives nothing else earns most."""
    return [sum(token % 4 == 1 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def configuration(model: Path, data: Path, seed: int, *, control: bool) -> RunConfig:
    """LoRA, 32 completions of four prompts per step."""
    names = {"calm": "benchmarks.branches:calm", "pulled": "benchmarks.branches:pull"}
    branches = {name: {"beta": BETA, "kl_band": BANDS[name], "rewards": [name]} for name in BANDS}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(model)},
            "peft": {"r": 8, "target_modules": "all-linear"},
            "data": {"path": str(data), "prompt_format": "text"},
            "rewards": [{"name": name, "label": label} for label, name in names.items()],
            "branches": {"column": "task", **branches, "control": CONTROL if control else None},
            "grpo": {
                "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant", "num_generations": 8,
                "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_completion_length": LENGTH,
                "logging_steps": 1, "seed": seed, "save_strategy": "no", "report_to": "none",
            },
            "speedups": "none",
        }
    )  # fmt: skip


def trained(config: RunConfig, folder: Path) -> dict[str, Any]:
    """KL of each branch over the last steps, its weight then, and the lines of the controller."""
    said: list[str] = []
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(folder)}, say=said.append)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "kl" in line]
    row: dict[str, Any] = {"step_s": statistics.median(line["step_time"] for line in lines)}
    for name, (low, high) in BANDS.items():
        kl = statistics.fmean(line[f"branch/{name}/kl"] for line in lines[-LAST:] if f"branch/{name}/kl" in line)
        row |= {
            f"{name}_kl": kl,
            f"{name}_inside": low <= kl <= high,
            f"{name}_beta": lines[-1][f"branch/{name}/beta"],
            f"{name}_reward": [
                statistics.fmean(line[f"branch/{name}/reward"] for line in part if f"branch/{name}/reward" in line)
                for part in (lines[:LAST], lines[-LAST:])
            ],
        }
    return row | {"changes": [line for line in said if ": beta " in line]}


def main() -> None:
    """Train, and write `docs/benchmarks/branches.json`."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny_model("qwen3", Path(folder)), Path(folder) / "rows.jsonl"
        prompts = [{"prompt": " ".join([TEXTS[name]] * (1 + n % 4)), "task": name} for n in range(16) for name in BANDS]
        data.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
        for seed in range(seeds):
            for control in (True, False):
                config = configuration(model, data, seed, control=control)
                rows.append({"seed": seed, "control": control, **trained(config, Path(folder) / "out")})
                sys.stdout.write(f"{ {key: value for key, value in rows[-1].items() if key != 'changes'} }\n")
    ratios = {}
    for control, words in ((True, "with control"), (False, "without")):
        mine = [row for row in rows if row["control"] is control]
        for name, band in BANDS.items():
            middle = statistics.fmean(band)
            ratios[f"KL of {name} over the middle of its band, {words}"] = ratio(
                [row[f"{name}_kl"] / middle for row in mine]
            )
        inside = [float(all(row[f"{name}_inside"] for name in BANDS)) for row in mine]
        ratios[f"seeds with both branches inside, {words}"] = {
            "median": sum(inside),
            "low": sum(inside),
            "high": sum(inside),
            "n": len(inside),
        }
    write("branches", "python -m benchmarks.branches", rows, ratios)


if __name__ == "__main__":
    main()
