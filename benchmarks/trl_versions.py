"""This package on several versions of TRL: seams, a probe, training, resuming, and each speed-up against plain TRL.

    python -m benchmarks.trl_versions [--versions 1.12.0 ...] [--short] [--write]

Each version's wheel lies in `.venv-trl/VERSION` (`make test-trl` puts it there), and a process of its own imports it in
front of what is installed; `oldest` is a folder with the oldest TRL, transformers and PEFT. *Seams*: rows of the table
that it has, and those that it lacks, with the stage that each costs. *Probe*: how far the stages of a step are from
adding up to it. *Train, resume*: the largest difference of any logged loss between a run that was stopped by a signal
and went on, and one that was not. *Exact*: five optimizer steps by plain gradient descent with each speed-up, with all
of them together, and with plain TRL once more: rewards must be equal, and weights within the tolerance of plain TRL's
of the same version.

TRL 1.15 computes log-probs by Triton kernels alone, which a CPU does not run: there they are replaced by the same sums
in torch, which TRL 1.16 has beside them. `--short` leaves single speed-ups out; `--write` writes the JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware.versions import check_log_probs

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / ".venv-trl"
NAME = "trl_versions"
VERSIONS = ("oldest", "1.12.0", "1.13.0", "1.14.2", "1.15.0", "1.16.0")
NEWEST = VERSIONS[-1]
TOLERANCE = 1e-6
KERNELS = "trl/kernels/chunked_logprob.py"
GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4, "num_iterations": 2,
    "beta": 0.0, "max_completion_length": 8, "max_steps": 5,
}  # fmt: skip
"""Where all apply: reuse of completions makes an old-policy pass, and without KL a dead row has no gradient."""


def sums_in_torch() -> None:
    """Have TRL's log-probs take the functions of the newest TRL, which need no Triton."""
    from trl.trainer import utils

    spec = importlib.util.spec_from_file_location("trl.kernels.chunked_logprob", WHEELS / NEWEST / KERNELS)
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    utils._ChunkedLogProbFunction = kernels.ChunkedLogProbFunction


def half_dead(completions: list[Any], **columns: Any) -> list[float]:
    """Spread in every other group."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [length % 7 / 6 if index // 4 % 2 == 0 else 0.0 for index, length in enumerate(lengths)]


async def zero(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that may run beside the training."""
    return [0.0] * len(completions)


def exactness(model: Path, rows: Any, folder: Path, cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each case of speed-ups: which are on, whether rewards are plain TRL's, and the largest gap of any weight."""
    from tests.support.pairs import gap, rewards_of, trained, weights_of

    told: dict[str, dict[str, Any]] = {}
    wanted: tuple[list[float], Any] = [], {}
    for case, names in {"plain": "none", **cases}.items():
        trainer, speedups = trained(names, model, rows, folder, rewards=[half_dead, zero], **GRPO)
        found = rewards_of(trainer), weights_of(trainer)
        wanted = wanted if told else found
        off = [row.reason for row in speedups.table() if not row.on and row.name == case]
        on = [row.name for row in speedups.table() if row.on]
        told[case] = {"on": on, "off": off, "equal_rewards": found[0] == wanted[0], "weights": gap(found[1], wanted[1])}
        speedups.remove()
    del told["plain"]
    return told


def probed(model: Path, rows: Any, folder: Path) -> dict[str, Any]:
    """Steps of a probe, the stages that took time, and the largest share of a step by which its stages miss it."""
    from grpo_autotune.probe.probe import Probe
    from grpo_autotune.seams.table import TABLE, lost
    from tests.support.trainers import make_trainer

    trainer = make_trainer(model, rows, folder, **GRPO)
    gone = lost(trainer)
    probe = Probe(trainer, warmup=0)
    trainer.train()
    timings = probe.record().timings
    probe.detach()
    missed = [
        abs(sum(row.per_step_s[step] for row in timings.stages) - whole) / whole
        for step, whole in enumerate(timings.step_s)
    ]
    return {
        "seams": len(TABLE) - len(gone), "lost": {key: error.what for key, error in gone.items()},
        "steps": len(missed), "stages": [row.name for row in timings.stages if sum(row.per_step_s)],
        "missed": max(missed),
    }  # fmt: skip


def resumed(model: Path, folder: Path) -> dict[str, Any]:
    """Optimizer steps of two runs, one of which was stopped and went on, and how far their losses are apart."""
    from grpo_autotune.train import trainer
    from tests.support import training

    config = training.text_config(model, folder, {"speedups": "auto"}, save_steps=2)
    with patch.object(trainer, "check_log_probs"):  # as `sums_in_torch`
        trainer.run_training(config, folder / "whole")
        os.environ |= {"KILL_AT_CALL": "3", "KILL_SIGNAL": "15"}
        training._calls = 0
        stopped = trainer.run_training(config, folder / "cut")
        del os.environ["KILL_AT_CALL"]
        ended = trainer.run_training(config, folder / "cut", resume=True)
    pairs = zip(*(training.losses(folder / name) for name in ("whole", "cut")), strict=True)
    return {"steps": ended.steps, "stopped_after": stopped.steps, "losses": max(abs(a - b) for a, b in pairs)}


def here(short: bool) -> dict[str, Any]:
    """All of it with the TRL that is imported."""
    from importlib.metadata import version

    row: dict[str, Any] = {name: version(name) for name in ("trl", "transformers", "peft")}
    from grpo_autotune.commands.imports import mend_torchvision

    mend_torchvision()
    try:
        check_log_probs("cpu")
    except EnvironmentProblem as error:
        row["refused_on_cpu"] = str(error)
        sums_in_torch()
    from grpo_autotune.registry import names
    from tests.support.exactness_ranks import rows_of
    from tests.support.tiny import tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, text = (tiny_model(kind, folder) for kind in ("qwen3_vl", "qwen3"))
        every = [name for name in names("speedup") if name != "lora_input"]  # which needs half precision
        single = {} if short else {name: [name] for name in every} | {"plain again": "none"}
        row["probe"] = probed(pictures, rows_of("picture"), folder / "out")
        row["train"] = resumed(text, folder)
        row["exact"] = exactness(pictures, rows_of("picture"), folder / "out", {**single, "all": every})
        row["exact"]["all, text"] = exactness(text, rows_of("text"), folder / "out", {"all": "auto"})["all"]
    return row


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a version, in words."""
    if row["probe"]["missed"] > TOLERANCE or row["probe"]["lost"]:
        yield f"probe: {row['probe']}"
    if row["train"]["losses"] > TOLERANCE or row["train"]["stopped_after"] >= row["train"]["steps"]:
        yield f"resume: {row['train']}"
    for case, found in row["exact"].items():
        if not found["equal_rewards"] or found["weights"] > TOLERANCE or found["off"]:
            yield f"{case}: {found}"


def in_a_process(version: str, short: bool) -> dict[str, Any] | None:
    """The row of one version; None where its process ended with an error, which it has told."""
    paths = [str(WHEELS / version), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.trl_versions", "--here", *["--short"] * short]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    with suppress(ValueError, IndexError):
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    return None


def main() -> int:
    """Try each version and print a line for it; 1 where something is wrong with one."""
    parser = argparse.ArgumentParser(description="This package on several versions of TRL.")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(f"\n{json.dumps(here(options.short))}")
        return 0
    rows, failed = [], False
    for version in options.versions:
        row = in_a_process(version, options.short)
        if row is None:
            print(f"TRL {version}: ended with an error", flush=True)
            failed = True
            continue
        rows.append(row)
        wrong = list(faults(row))
        largest = max(found["weights"] for found in row["exact"].values())
        beside = f"transformers {row['transformers']}, PEFT {row['peft']}"
        told = f"TRL {row['trl']}, {beside}: {row['probe']['seams']} seams, weights {largest:.1e} apart"
        print(told, *wrong, sep="\n  ", flush=True)
    if options.write and not failed:
        from benchmarks.result import write

        write(NAME, f"python -m benchmarks.{' '.join([NAME, *sys.argv[1:]])}", rows, {})
    return int(failed or any(wrong for row in rows for wrong in faults(row)))


if __name__ == "__main__":
    sys.exit(main())
