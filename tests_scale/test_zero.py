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

EXACT = 5e-5
"""Largest difference of a weight after four steps of Adam at a rate of 0.01, and of a logged number: float32 sums in
another order."""

Tiny = Callable[[str], Path]
STAGES: dict[str, Any] = {"ddp": None, "zero1": "zero1", "zero2": "zero2", "zero3": {"name": "zero3"}}
NOT_GATHERED = {"name": "zero3", "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}


PACKED = {"model": {"load_in_4bit": True, "dtype": "float32"}}


def values(
    model: Path, folder: Path, deepspeed: Any = None, *, full: bool = False, packed: bool = False, **grpo: Any
) -> dict[str, Any]:
    sharding = {"deepspeed": deepspeed} if deepspeed else {}
    changes: dict[str, Any] = {"peft": None} if full else PACKED if packed else {}
    rate = {"learning_rate": 1e-3} if full else {}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return text_config(model, folder, changes, **{**small, **rate, **sharding, **grpo}).to_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() ^ b.keys() <= {"lm_head.weight"}  # tied: DeepSpeed saves it under both names
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() & b.keys())


def numbers(folder: Path) -> list[list[float]]:
    return [[line[key] for key in ("loss", "reward", "grad_norm", "kl")] for line in log_lines(folder)]


def close(a: Path, b: Path) -> None:
    assert torch.allclose(torch.tensor(numbers(a)), torch.tensor(numbers(b)), atol=EXACT, rtol=1e-4), (a, b)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Adapters and whole models under DDP and every stage; a ZeRO-2 run stopped and resumed, a ZeRO-3 run killed."""
    place, plan = tmp_path_factory.mktemp("zero"), []
    model = tiny("qwen3")
    for full, stages in ((False, STAGES), (True, {**STAGES, "zero3": NOT_GATHERED})):
        for name, deepspeed in stages.items():
            config = values(model, place, deepspeed, full=full)
            plan.append({"config": config, "folder": f"{place}/{'full' if full else 'lora'}-{name}"})
    for name in ("zero2", "zero3"):
        packed = values(model, place, STAGES[name], packed=True)
        plan.append({"config": packed, "folder": f"{place}/packed-{name}"})
    cut = {"config": values(model, place, "zero2", save_steps=10), "folder": f"{place}/stopped"}
    plan += [{**cut, "env": sent(signal.SIGUSR1, call=3)}, {**cut, "resume": True}]
    plan += [
        {"config": values(model, place, "zero3"), "folder": f"{place}/killed", "env": sent(signal.SIGKILL, call=4)}
    ]
    return place, train_all(plan, place / "plan.json", ends=1)


def sent(signum: signal.Signals, *, call: int, rank: int = 1) -> dict[str, str]:
    """Variables by which a rank gets a signal while it computes its `call`-th rewards."""
    return {"KILL_AT_CALL": str(call), "KILL_SIGNAL": str(int(signum)), "KILL_RANK": str(rank)}


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


def test_weights_in_4_bits_are_shared_as_they_lie(trained: tuple[Path, str]) -> None:
    place, _ = trained
    close(place / "packed-zero3", place / "packed-zero2")
    rounding = 2**-9  # of the adapter, which TRL has in bfloat16 beside weights in 4 bits
    assert gap(weights(place / "packed-zero3"), weights(place / "packed-zero2")) < rounding


def test_a_stopped_run_goes_on(trained: tuple[Path, str]) -> None:
    place, said = trained
    assert "stopped rank 0 exit code 138" in said and "resuming at step 3" in said
    close(place / "stopped", place / "lora-zero2")
    assert saved_by(place / "lora-zero3" / "checkpoints" / "checkpoint-4") == ("ZeRO-3", 2)
    assert saved_by(place / "stopped" / "checkpoints" / "checkpoint-3") == ("ZeRO-1 or 2", 2)
    assert [(one.step, one.flaw) for one in survey(place / "killed" / "checkpoints")] == [(2, None)]


def test_parts_become_one_model(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = trained
    run = place / "full-zero3"
    assert not list(run.rglob("*.safetensors"))
    assert main(["merge", str(run), str(place / "merged"), "--rows", "1"]) == 0, capsys.readouterr().err
    assert gap(load_file(place / "merged" / "model.safetensors"), weights(place / "full-ddp")) < EXACT


@pytest.mark.long
def test_other_numbers_of_processes(trained: tuple[Path, str], tiny: Tiny) -> None:
    """Two processes, then one for a step, then two: what DDP learns on the same way."""
    place, model, plan = trained[0], tiny("qwen3"), []
    names = ("ddp", "zero2", "zero3")
    for name in names:
        folder = place / f"moved-{name}"
        shutil.copytree(place / f"lora-{name}", folder, symlinks=True)
        for left in (folder / "model", folder / "checkpoints" / "checkpoint-4"):
            shutil.rmtree(left)
        alone = values(model, place, STAGES[name], gradient_accumulation_steps=4)
        plan.append(
            {"config": alone, "folder": str(folder), "resume": True, "env": sent(signal.SIGUSR1, call=1, rank=0)}
        )
    said = train_all(plan, place / "alone.json", processes=1)
    assert said.count("checkpoint-2 was saved at world size 2 and is read at 1") == 2
    back = [{"config": values(model, place, STAGES[n]), "folder": f"{place}/moved-{n}", "resume": True} for n in names]
    back.append({"config": values(model, place, "zero3"), "folder": f"{place}/killed", "resume": True})
    said = train_all(back, place / "back.json")
    assert said.count("checkpoint-3 was saved at world size 1 and is read at 2") == 2
    assert not list(place.rglob("*_universal"))
    for name in ("zero2", "zero3"):
        assert [line["step"] for line in log_lines(place / f"moved-{name}")] == [1, 2, 3, 4]
        close(place / f"moved-{name}", place / "moved-ddp")
        assert gap(weights(place / f"moved-{name}"), weights(place / "moved-ddp")) < EXACT
    assert log_lines(place / "killed") == log_lines(place / "lora-zero3")


@pytest.mark.long
def test_what_is_kept_in_the_hosts_memory_learns_the_same_and_goes_on(
    trained: tuple[Path, str], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """With DeepSpeed's own Adam, which is compiled first where it has not been."""
    place, model, plan = trained[0], tiny("qwen3"), []
    for name in ("zero2", "zero3"):
        config = values(model, place, {"name": name, "offload": "cpu"})
        cut = {"config": config, "folder": f"{place}/host-{name}", "env": sent(signal.SIGUSR1, call=3)}
        plan += [cut, {"config": config, "folder": cut["folder"], "resume": True}]
    said = train_all(plan, place / "host.json")
    assert said.count("resuming at step 3") == 2
    for name in ("zero2", "zero3"):
        run = place / f"host-{name}"
        close(run, place / "lora-ddp")
        assert gap(weights(run), weights(place / "lora-ddp")) < EXACT
        assert main(["merge", str(run), str(place / f"merged-{name}"), "--rows", "1"]) == 0, capsys.readouterr().err
