"""Two objectives in one run: does each branch's KL end inside its band, and where does it end without the controller?

    python -m benchmarks.branches

A tiny text model (two layers, random weights) is rewarded for an answer of full length in the rows of one branch, as
most are, and for a quarter of all tokens in the rows of the other, which pulls it away. Each seed trains twice from the
same weights, with the controller and without (`control: null`). A branch's KL at the end is its mean over the last 20
steps. Learning rate, steps and controller were chosen on seeds 10 and 11, which are not among those judged here.
"""

from __future__ import annotations

import itertools
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

SEEDS, STEPS, LAST, LENGTH = 5, 200, 20, 4
BANDS = {"calm": [0.02, 0.06], "pulled": [0.08, 0.15]}
TEXTS = {"calm": "Which digit is shown? How many are there?", "pulled": "left right red green blue yes no"}
REWARDS = {"calm": "benchmarks.branches:calm", "pulled": "benchmarks.branches:pull"}


def calm(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 for an answer of full length, which most are."""
    return [float(len(ids) == LENGTH) for ids in completion_ids]


def pull(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of tokens of one residue: a model that gives nothing else earns most."""
    return [sum(token % 4 == 1 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def configuration(model: Path, data: Path, seed: int, *, control: bool) -> RunConfig:
    """LoRA, 32 completions of four prompts per step."""
    branches = {name: {"beta": 0.1, "kl_band": band, "rewards": [name]} for name, band in BANDS.items()}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(model)},
            "peft": {"r": 8, "target_modules": "all-linear"},
            "data": {"path": str(data), "prompt_format": "text"},
            "rewards": [{"name": name, "label": label} for label, name in REWARDS.items()],
            "branches": {"column": "task", **branches, "control": {"every": 4} if control else None},
            "grpo": {
                "max_steps": STEPS, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "num_generations": 8,
                "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_completion_length": LENGTH,
                "logging_steps": 1, "seed": seed, "save_strategy": "no", "report_to": "none",
            },
            "speedups": "none",
        }
    )  # fmt: skip


def trained(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Of each branch, KL and reward over the first and the last steps, and its weight at the end."""
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(folder)}, say=lambda line: None)
    trainer.train()
    log, rows = trainer.state.log_history, []
    for name, (low, high) in BANDS.items():
        lines = [line for line in log if f"branch/{name}/kl" in line]
        first = [line for line in lines if line["step"] <= LAST]
        last = [line for line in lines if line["step"] > STEPS - LAST]
        kl = statistics.fmean(line[f"branch/{name}/kl"] for line in last)
        reward = [statistics.fmean(line[f"branch/{name}/reward"] for line in part) for part in (first, last)]
        ended = {"kl": kl, "inside": low <= kl <= high, "beta": last[-1][f"branch/{name}/beta"]}
        rows.append({"branch": name, "band": BANDS[name], **ended, "reward_first_last": reward})
    return rows


def main() -> None:
    """Train, and write `docs/benchmarks/branches.json`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny_model("qwen3", Path(folder)), Path(folder) / "rows.jsonl"
        prompts = [{"prompt": " ".join([TEXTS[name]] * (1 + n % 4)), "task": name} for n in range(16) for name in BANDS]
        data.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
        for seed, control in itertools.product(range(SEEDS), (True, False)):
            config = configuration(model, data, seed, control=control)
            ended = trained(config, Path(folder) / "out")
            rows += [{"seed": seed, "control": control, **row} for row in ended]
            sys.stdout.write(f"seed {seed}, control {control}: {ended}\n")
    ratios = {}
    for control, words in ((True, "with control"), (False, "without")):
        mine = [row for row in rows if row["control"] is control]
        for name, band in BANDS.items():
            over = [row["kl"] / statistics.fmean(band) for row in mine if row["branch"] == name]
            ratios[f"KL of {name} over the middle of its band, {words}"] = ratio(over)
        inside = sum(all(row["inside"] for row in mine if row["seed"] == seed) for seed in range(SEEDS))
        ratios[f"seeds with both branches inside, {words}"] = {
            "median": inside,
            "low": inside,
            "high": inside,
            "n": SEEDS,
        }
    write("branches", "python -m benchmarks.branches", rows, ratios)


if __name__ == "__main__":
    main()
