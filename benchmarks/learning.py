"""Whether training learns: the demo's held-out reward before and after GRPO, over several seeds.

    python -m benchmarks.learning [CONFIG] [SEEDS]

Each seed trains the whole profile from the same warm start; the held-out digits are in no training row. Rewards are
means over the held-out split, answers sampled as in training.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.config.schema import RunConfig, load_config

SEEDS = 3


def main() -> None:
    """Train once a seed, and write `docs/benchmarks/learning.json`."""
    source = sys.argv[1] if len(sys.argv) > 1 else "demo"
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else SEEDS
    model_s = _model_ready(load_config(source))
    rows = []
    for seed in range(seeds):
        rows.append(_run(load_config(source, [f"grpo.seed={seed}"]), seed) | {"model_build_s": model_s})
        sys.stdout.write(f"{rows[-1]}\n")
    found = {
        "held_out_reward_after_over_before": ratio([row["reward_after"] / row["reward_before"] for row in rows]),
        "held_out_digit_after_over_before": ratio([row["digit_after"] / row["digit_before"] for row in rows]),
    }
    path = write("learning", "python -m benchmarks.learning", rows, found)
    sys.stdout.write(f"{found}\n{path}\n")


def _model_ready(config: RunConfig) -> float | None:
    """Build the registered model of `config` if the cache does not hold it; seconds, None where it was there."""
    from grpo_autotune.registry import names, resolve

    name = config.model.name_or_path
    if name not in names("model"):
        return None
    begun = time.monotonic()
    resolve("model", name)()
    seconds = time.monotonic() - begun
    return seconds if seconds > 1 else None


def _run(config: RunConfig, seed: int) -> dict[str, Any]:
    from grpo_autotune.train.trainer import build_trainer

    overrides = {"eval_on_start": False, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, grpo_overrides=overrides | {"output_dir": str(Path(folder) / "run")})
        before = trainer.evaluate()
        begun = time.monotonic()
        trainer.train()
        train_s = time.monotonic() - begun
        after = trainer.evaluate()
    steps = [line for line in trainer.state.log_history if "step_time" in line and "reward" in line]
    return {
        "seed": seed,
        "reward_before": before["eval_reward"],
        "reward_after": after["eval_reward"],
        "digit_before": before["eval_rewards/exact_match/mean"],
        "digit_after": after["eval_rewards/exact_match/mean"],
        "format_before": before["eval_rewards/format/mean"],
        "format_after": after["eval_rewards/format/mean"],
        "held_out_rows": len(trainer.eval_dataset),
        "optimizer_steps": trainer.state.global_step,
        "train_s": train_s,
        "step_s": statistics.median(line["step_time"] for line in steps),
        "kl_last": steps[-1]["kl"],
        "load_average": os.getloadavg()[0],
        "train_rewards": [line["reward"] for line in steps],
    }


if __name__ == "__main__":
    main()
