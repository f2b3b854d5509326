"""How far off the search's models are: predicted against measured seconds and memory at knob values not seen before.

    python -m benchmarks.model_error [FOLDER]

Two cases: the demo, and the model of 14 million parameters at 512 pixels. Each setting is a short trial with the probe
in a process of its own: a warm-up step and three measured ones. The models begin from the probe of the user's own
setting and are judged twice: `one_left_out` predicts each setting from all others, `before_learning` predicts it before
it is learnt, in a fixed random order, as a search does. Stages that take less than `SMALL_SHARE` of their step are left
out; memory is the increment over the idle process. Trials run on one thread and seconds are the process's CPU time,
which other work on the machine disturbs least. `FOLDER` keeps the outcomes: what is there is not measured again.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.midsize import midsize_config
from benchmarks.result import ratio, write
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import detect
from grpo_autotune.knobs import Knobs, with_knobs
from grpo_autotune.predict.models import Models, stage_seconds
from grpo_autotune.records.trial import TrialOutcome

SMALL_SHARE = 0.05
MEASURED_STEPS = 3
SETTINGS = {"midsize": 24, "demo": 20}
AXES: dict[str, dict[str, list[Any]]] = {
    "midsize": {
        "grpo.per_device_train_batch_size": [1, 2, 4, 8],
        "grpo.num_generations": [8, 4],
        "grpo.gradient_checkpointing": [True, False],
        "model.attn_implementation": [None, "eager"],
        "data.image_size": [None, 384, 256, 128],
        "grpo.beta": [0.04, 0.0],
        "prompts_per_step": [1, 2],
    },
    "demo": {
        "grpo.per_device_train_batch_size": [64, 32, 16, 8],
        "grpo.num_generations": [8, 4, 16],
        "grpo.gradient_checkpointing": [False, True],
        "model.attn_implementation": [None, "eager"],
        "data.image_size": [None, 64],
        "prompts_per_step": [8, 4, 16],
    },
}
"""Knob -> values, the user's own first."""


class Trial(NamedTuple):
    """One setting and what came of it."""

    knobs: Knobs
    config: RunConfig
    outcome: TrialOutcome


class Judged(NamedTuple):
    """One prediction: what of, in which setting, and measured."""

    case: str
    how: str
    setting: int
    name: str
    predicted: float
    measured: float


def main() -> None:
    """Measure what is not there yet, judge the models, write `docs/benchmarks/model_error.json`."""
    if sys.argv[1:2] == ["--trial"]:
        run_trial(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        judged = [one for case in AXES for one in judge(case, measure(case, folder / case))]
    rows = [one._asdict() | {"error": abs(one.predicted / one.measured - 1.0)} for one in judged]
    found = {}
    for case, how in itertools.product(AXES, ("one_left_out", "before_learning")):
        of_case = [row for row in rows if row["case"] == case and row["how"] == how]
        for kind in ("stages", "step", "memory"):
            errors = [
                row["error"]
                for row in of_case
                if (row["name"] if row["name"] in ("step", "memory") else "stages") == kind
            ]
            found[f"{case}_{how}_{kind}_error"] = ratio(errors) | {"p90": percentile(errors, 0.9)}
    path = write("model_error", "python -m benchmarks.model_error", rows, found)
    for name, summary in found.items():
        sys.stdout.write(f"{name}: median {summary['median']:.3f}, p90 {summary['p90']:.3f}, n {summary['n']}\n")
    sys.stdout.write(f"{path}\n")


def base_config(case: str) -> RunConfig:
    """The user's own setting; completions of the mid-size model all have one length."""
    if case == "demo":
        return load_config("demo", ["grpo.eval_strategy=no", "grpo.max_steps=100"])
    grpo = {"generation_kwargs": {"min_new_tokens": 48}, "eval_strategy": "no"}
    return midsize_config("14m", pixels=512, completion=48, grpo=grpo)


def settings(case: str) -> list[Knobs]:
    """The user's own values, then legal settings drawn without repetition."""
    axes, base = AXES[case], base_config(case)
    every = [dict(zip(axes, picked, strict=True)) for picked in itertools.product(*axes.values())]
    own, found = every[0], []
    random.Random(0).shuffle(every)
    for knobs in every:
        try:
            with_knobs(base, knobs)
        except ConfigError:
            continue
        if knobs != own:
            found.append(knobs)
    return [own, *found[: SETTINGS[case] - 1]]


def measure(case: str, folder: Path) -> list[Trial]:
    """A trial of each setting, in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = []
    for number, knobs in enumerate(settings(case)):
        config = with_knobs(base_config(case), knobs)
        out = folder / f"{number:02d}.json"
        if not out.is_file():
            spec = folder / f"{number:02d}.spec.json"
            spec.write_text(json.dumps({"number": number, "config": config.to_dict(), "knobs": knobs}))
            begun = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.model_error", "--trial", str(spec), str(out)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            sys.stderr.write(f"{case} {number} {knobs}: {time.monotonic() - begun:.0f} s\n")
        trials.append(Trial(knobs, config, TrialOutcome.model_validate_json(out.read_bytes())))
    return trials


def run_trial(spec_path: Path, out: Path) -> None:
    """Train a warm-up and `MEASURED_STEPS` steps with the probe, and write the outcome."""
    from grpo_autotune.seams.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import torch

    import grpo_autotune.train.trainer  # noqa: F401  its imports belong to the idle process
    from grpo_autotune.probe.probe import Probe
    from grpo_autotune.probe.startup import Startup
    from grpo_autotune.train.runs.callbacks import StopAfter
    from grpo_autotune.train.trial_trainer import quiet_trainer

    torch.set_num_threads(1)
    spec = json.loads(spec_path.read_text())
    idle_bytes = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    trainer = quiet_trainer(RunConfig.from_dict(spec["config"]), Startup(), lambda line: None)
    probe = Probe(trainer)
    probe.recorder.clock = time.process_time
    trainer.add_callback(StopAfter(probe.warmup + -(-MEASURED_STEPS // probe.cycle) * probe.cycle))
    trainer.train()
    record = probe.record()
    outcome = TrialOutcome(
        number=spec["number"],
        status="ok",
        record=record,
        step_s=record.timings.step_s,
        peak_bytes=_status_bytes("VmHWM"),
        idle_bytes=idle_bytes,
    )
    out.write_text(outcome.model_dump_json())


def judge(case: str, trials: Sequence[Trial]) -> Iterator[Judged]:
    """Predictions of both kinds, against what was measured."""
    machine, own = detect(), trials[0]
    assert own.outcome.record is not None
    first = Models.from_probe(own.config, own.outcome.record, machine, own.outcome)
    growing = first
    for number, trial in enumerate(trials[1:], 1):
        others = first
        for other in trials[1:]:
            if other is not trial:
                others = others.learn(other.config, other.outcome)
        for how, models in (("one_left_out", others), ("before_learning", growing)):
            for name, predicted, measured in compared(models, trial):
                yield Judged(case, how, number, name, predicted, measured)
        growing = growing.learn(trial.config, trial.outcome)


def compared(models: Models, trial: Trial) -> Iterator[tuple[str, float, float]]:
    """Name, predicted and measured of each stage that matters, of the step, and of memory."""
    outcome = trial.outcome
    assert outcome.record is not None and outcome.peak_bytes is not None and outcome.idle_bytes is not None
    measured, predicted = stage_seconds(outcome.record.timings), models.stages_s(trial.config)
    step_s = sum(measured.values())
    for name, seconds in measured.items():
        if seconds >= SMALL_SHARE * step_s:
            yield name, predicted[name].value, seconds
    yield "step", models.step_s(trial.config).value, step_s
    increment = models.peak_bytes(trial.config).value - outcome.idle_bytes
    yield "memory", increment, float(outcome.peak_bytes - outcome.idle_bytes)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share lies at or below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
