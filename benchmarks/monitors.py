"""How often the monitors fire on healthy runs, and how soon on faults.

    python -m benchmarks.monitors [record]

`record` trains the demo `RUNS` times for `STEPS` steps, each with another seed and other settings, and keeps what the
monitors read of each log in `docs/benchmarks/monitors_logs.json.gz`. A run counts as healthy where it ended and its
held-out reward is not below that of its start. Without `record` the kept logs are replayed: every alert is a false one.
Each fault is put from step 31 on into each healthy log that has the metric at each step (a stall apart, whose clock is
not a log's): a monitor has to fire once, and within its persistence. A ratio's `n` is the number of runs, for false
alarms of those in which the monitor had something to read.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.result import write
from grpo_autotune.config.sections.monitors import MONITORS, MonitorsSection
from grpo_autotune.train.monitors.rules import LEAST, Run, spread_of
from grpo_autotune.train.monitors.watch import Watch
from tests.support.faulty_logs import FAULTS, LOGS, START, healthy_logs, replayed

RUNS, STEPS = 24, 50
LINEAR = "loss_spike with norms on a linear scale: false alarms per run"
KEPT = {
    *("kind", "step", "loss", "grad_norm", "reward", "kl", "entropy", "frac_reward_zero_std", "memory_share"),
    *("completions/mean_length", "completions/clipped_ratio", "eval_reward", "eval_reward_std"),
    *("eval_runtime", "eval_samples_per_second"),
}
CYCLES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (5e-4, 1e-3, 1.5e-3),
    "beta": (0.02, 0.0, 0.1, 0.04, 0.0),
    "num_generations": (8, 8, 4, 16),
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "dapo"),
    "num_iterations": (1, 1, 1, 2, 1, 1, 1),
    "temperature": (1.0, 1.0, 0.8),
    "logging_steps": (1, 1, 1, 1, 1, 1, 1, 5),
}
"""Key -> its values, which run i takes at place i, counted round: the lengths have few factors in common."""


def record() -> None:
    """Train the runs, and keep their logs."""
    from grpo_autotune.commands.imports import mend_torchvision
    from grpo_autotune.config.schema import load_config

    mend_torchvision()
    from grpo_autotune.train.trainer import run_training

    runs = []
    for number in range(RUNS):
        settings = {key: values[number % len(values)] for key, values in CYCLES.items()} | {"seed": number}
        fixed = {"max_steps": STEPS, "eval_steps": 10, "save_strategy": "no"}
        changes = [f"grpo.{key}={value}" for key, value in (settings | fixed).items()]
        with tempfile.TemporaryDirectory() as folder:
            config = load_config("demo", [*changes, "speedups=auto", "data.max_eval_samples=100", "monitors=none"])
            run_training(config, Path(folder) / "run")
            lines = (Path(folder) / "run" / "train_log.jsonl").read_text().splitlines()
        runs.append({"settings": settings, "log": [kept(json.loads(line)) for line in lines]})
        LOGS.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """What the monitors read of a line, numbers to six figures."""
    values = {key: value for key, value in row.items() if key in KEPT}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}


def ends_well(log: list[dict[str, Any]]) -> bool:
    """True for a run that reached its last step and whose held-out reward did not fall."""
    rewards = [row["eval_reward"] for row in log if row["kind"] == "eval"]
    return bool(log[-1]["step"] == STEPS and rewards[-1] >= rewards[0])


def delay(name: str, log: list[dict[str, Any]], run: dict[str, Any]) -> list[int]:
    """Lines from the first faulty one to each alert of the monitor, both counted."""
    fault = FAULTS[name]
    rows = fault.of(log)
    kind = "eval" if name == "held_out_gap" else "train"
    steps = [row["step"] for row in rows if row["kind"] == kind and row["step"] >= START]
    alerts = replayed(rows, Run(**{"beta": run["beta"], **fault.run}))
    return [1 + steps.index(alert.step) for alert in alerts if alert.monitor == name]


def spikes(log: list[dict[str, Any]]) -> bool | None:
    """True where a gradient norm of a log would be a spike on a linear scale; None where there are too few."""
    norms, sigmas = [row["grad_norm"] for row in log if row["kind"] == "train"], MONITORS["loss_spike"][0]["above"]
    spreads = [(norm, *spread_of(norms[:at])) for at, norm in enumerate(norms) if at >= LEAST]
    return any(norm > median + sigmas * sigma for norm, median, sigma in spreads) if spreads else None


def main() -> None:
    """Replay the logs and write `docs/benchmarks/monitors.json`."""
    if sys.argv[1:] == ["record"]:
        record()
    rows, fine, read = list[dict[str, Any]](), list[dict[str, Any]](), Counter[str]()
    for run in healthy_logs():
        settings, is_well = run["settings"], ends_well(run["log"])
        watch = Watch(MonitorsSection().items_on(), Run(settings["beta"], highest=1.0))
        alerts = [alert for row in run["log"] for alert in watch.see(row)]
        read.update({name for name, _ in watch.read} if is_well else ())
        told = [{"monitor": alert.monitor, "step": alert.step, "text": alert.text} for alert in alerts]
        rows.append({**settings, "healthy": is_well, "alerts": told})
        fine += [run] if is_well and settings["logging_steps"] == settings["num_iterations"] == 1 else []
    ratios = {}
    for name in FAULTS:
        false = sum(alert["monitor"] == name for row in rows if row["healthy"] for alert in row["alerts"])
        ratios[f"{name}: false alarms per run"] = {"median": false / max(1, read[name]), "n": read[name]}
        faulty = [run for run in fine if FAULTS[name].of(run["log"]) != run["log"]]
        delays = [delay(name, run["log"], run["settings"]) for run in faulty]
        once = sum(len(one) == 1 and one[0] <= MONITORS[name][0]["steps"] for one in delays)
        ratios[f"{name}: faults told once within persistence"] = {"median": once / len(faulty), "n": len(faulty)}
    well = [row for row in rows if row["healthy"]]
    linear = [
        spiked
        for run, row in zip(healthy_logs(), rows, strict=True)
        if row["healthy"]
        for spiked in [spikes(run["log"])]
    ]
    known = [spiked for spiked in linear if spiked is not None]
    ratios[LINEAR] = {"median": sum(known) / len(known), "n": len(known)}
    noisy = sum(bool(row["alerts"]) for row in well)
    ratios["healthy runs with any alert"] = {"median": noisy / len(well), "n": len(well)}
    path = write("monitors", "python -m benchmarks.monitors record", rows, ratios)
    sys.stdout.write(f"{json.dumps(ratios, indent=1)}\n{path}\n")


if __name__ == "__main__":
    main()
