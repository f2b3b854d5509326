"""How much sooner the speed-ups bring the demo to the same held-out reward.

    python -m benchmarks.time_to_reward [SEEDS]

Each seed trains the whole profile twice, by plain TRL and with `speedups: auto`; which comes first alternates. Every
`EVERY` steps the held-out split is evaluated; the clock stands still meanwhile. The reward to be reached is the highest
that both runs of a seed come to, less `SLACK`; a run is there at its first evaluation that is not below it. Ratios are
plain seconds over sped up, of the time to that reward and of the whole training.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.config.schema import load_config

mend_torchvision()

from transformers import TrainerCallback  # noqa: E402

from grpo_autotune.train.trainer import build_trainer  # noqa: E402

SEEDS = 3
EVERY = 8
SLACK = 0.03
"""About one standard error of a held-out reward."""


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of training until each evaluation, evaluations left out."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.points = trainer, list[tuple[float, float]]()
        self._spent_s, self._since_s = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY:
            return
        self._spent_s += time.perf_counter() - self._since_s
        self.points.append((self._spent_s, self.trainer.evaluate()["eval_reward"]))
        self._since_s = time.perf_counter()


def train(seed: int, speedups: str) -> list[tuple[float, float]]:
    """Seconds of training and held-out reward at each evaluation."""
    config = load_config("demo", [f"grpo.seed={seed}", f"speedups={speedups}"])
    quiet = {"eval_on_start": False, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, grpo_overrides=quiet | {"output_dir": str(Path(folder) / "run")})
        clock = Clock(trainer)
        trainer.add_callback(clock)
        trainer.train()
    return clock.points


def main() -> None:
    """Train in turns and write `docs/benchmarks/time_to_reward.json`."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS
    rows: list[dict[str, Any]] = []
    sooner, faster = [], []
    for seed in range(seeds):
        found = {speedups: train(seed, speedups) for speedups in (("none", "auto"), ("auto", "none"))[seed % 2]}
        goal = min(max(reward for _, reward in points) for points in found.values()) - SLACK
        reached = {
            speedups: next(spent for spent, reward in points if reward >= goal) for speedups, points in found.items()
        }
        sooner.append(reached["none"] / reached["auto"])
        faster.append(found["none"][-1][0] / found["auto"][-1][0])
        for speedups, points in found.items():
            row = {"seed": seed, "speedups": speedups, "goal": goal, "reached_s": reached[speedups]}
            rows.append({**row, "train_s": points[-1][0], "rewards": [reward for _, reward in points]})
            sys.stderr.write(f"{rows[-1]}\n")
    ratios = {"seconds_to_the_same_reward": ratio(sooner), "seconds_of_training": ratio(faster)}
    sys.stdout.write(f"{ratios}\n{write('time_to_reward', 'python -m benchmarks.time_to_reward', rows, ratios)}\n")


if __name__ == "__main__":
    main()
