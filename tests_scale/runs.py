"""`torchrun -m tests_scale.runs PLAN.json`: trainings one after the other in the same processes, started once.

The plan is a list of mappings: `config` (values of a `RunConfig`), `folder`, and maybe `resume`, `env` (variables of
this training alone) and `probe` (its report is kept in the folder). Each rank writes a line with folder and exit code
to standard output.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tests.support.training as training
from grpo_autotune.config.schema import RunConfig
from tests_scale.launch import launch


def train_all(plan: Sequence[Mapping[str, Any]], place: Path, *, processes: int = 2, ends: int = 0) -> str:
    """Run a plan on so many processes; what they said. The launch must end well, or with an error where `ends` is 1."""
    place.write_text(json.dumps(plan), encoding="utf-8")
    done = launch("tests_scale.runs", str(place), processes=processes)
    assert done.returncode == ends, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _watch(probes: list[Any], trainer: Any) -> None:
    from grpo_autotune.probe.probe import Probe

    probes.append(Probe(trainer))


def main(plan: str) -> None:
    from accelerate.state import AcceleratorState
    from torch import distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from grpo_autotune.report.create import report_of
    from grpo_autotune.report.files import save_report
    from grpo_autotune.train.trainer import run_training

    before = dict(os.environ)
    for run in json.loads(Path(plan).read_text(encoding="utf-8")):
        os.environ.update(run.get("env", {}))
        training._calls = 0
        config = RunConfig.from_dict(run["config"])
        probes: list[Any] = []
        watch = partial(_watch, probes) if run.get("probe") else None
        code = run_training(config, run["folder"], resume=run.get("resume", False), prepare=watch).exit_code
        for probe in probes:
            report = report_of(probe.record(), config, ceilings=False)
            if os.environ["RANK"] == "0":
                save_report(report, run["folder"])
            probe.detach()
        sys.stdout.write(f"{run['folder']} rank {os.environ['RANK']} exit code {code}\n")
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()  # else its threads may still run when the process ends, which aborts it


if __name__ == "__main__":
    main(sys.argv[1])
