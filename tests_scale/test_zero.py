"""Training under ZeRO on two processes: what plain DDP learns, sharded, saved, killed, resumed and put together."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_autotune.cli.main import main
from grpo_autotune.runs.checkpoints import saved_by, survey
from tests.support.training import log_lines, text_config
from tests_scale.runs import train_all

EXACT = 1e-5
"""Largest difference of a weight or a loss: float32 sums in another order, through five steps of Adam."""

Tiny = Callable[[str], Path]
STAGES: dict[str, Any] = {"ddp": None, "zero1": "zero1", "zero2": "zero2", "zero3": {"name": "zero3"}}
NOT_GATHERED = {"name": "zero3", "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}


def values(model: Path, folder: Path, deepspeed: Any = None, *, full: bool = False, **grpo: Any) -> dict[str, Any]:
    sharding = {"deepspeed": deepspeed} if deepspeed else {}
    changes = {"peft": None} if full else {}
    rate = {"learning_rate": 1e-3} if full else {}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return text_config(model, folder, changes, **small, **rate, **sharding, **grpo).to_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def numbers(folder: Path) -> list[list[float]]:
    return [[line[key] for key in ("loss", "reward", "grad_norm", "kl")] for line in log_lines(folder)]


def close(a: Path, b: Path) -> None:
    assert torch.allclose(torch.tensor(numbers(a)), torch.tensor(numbers(b)), atol=EXACT, rtol=1e-4), (a, b)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Adapters and whole models under DDP and every stage; a ZeRO-2 run that stopped and went on, a ZeRO-3 run killed."""
    place, plan = tmp_path_factory.mktemp("zero"), []
    model = tiny("qwen3")
    for full in (False, True):
        for name, deepspeed in STAGES.items():
            if full and name == "zero3":
                deepspeed = NOT_GATHERED
            kind = "full" if full else "lora"
            plan.append({"config": values(model, place, deepspeed, full=full), "folder": f"{place}/{kind}-{name}"})
    stop = {"KILL_AT_CALL": "3", "KILL_SIGNAL": str(int(signal.SIGUSR1)), "KILL_RANK": "1"}
    cut = {"config": values(model, place, "zero2", save_steps=10), "folder": f"{place}/stopped"}
    plan += [{**cut, "env": stop}, {**cut, "resume": True}]
    kill = {**stop, "KILL_SIGNAL": str(int(signal.SIGKILL))}
    plan += [{"config": values(model, place, "zero3"), "folder": f"{place}/killed", "env": kill}]
    return place, train_all(plan, place / "plan.json", ends=1)


def test_learns_what_ddp_learns(trained: tuple[Path, str]) -> None:
    place, said = trained
    for kind in ("lora", "full"):
        for name in ("zero1", "zero2", "zero3"):
            close(place / f"{kind}-{name}", place / f"{kind}-ddp")
            if (kind, name) != ("full", "zero3"):
                assert gap(weights(place / f"{kind}-{name}"), weights(place / f"{kind}-ddp")) < EXACT
    for stage in (1, 2):
        assert f"ZeRO-{stage} over 2 processes: each holds 100% of the parameters and 50%" in said
    assert "ZeRO-3 over 2 processes: each holds" in said
