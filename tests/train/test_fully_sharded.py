"""Training under FSDP2 on two processes: the losses and weights of plain DDP, and checkpoints that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_autotune.cli.main import main
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.processes.fresh import free_port
from tests.support.training import log_lines, picture_config, text_config

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
SGD = {
    "optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "save_steps": 2, "ddp_find_unused_parameters": False,
}  # fmt: skip
SAME = 2e-6
"""Largest difference of a weight in float32 after three steps, where FSDP adds up gradients in another order."""


def launch(*pairs: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(port)]
    return subprocess.run(
        [*command, "-m", "tests.support.fsdp_ranks", *pairs],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def written(folder: Path, name: str, config: RunConfig, **fsdp: Any) -> str:
    """The configuration in a file, under FSDP2 with these options or, without any, plainly."""
    values = config.to_dict()
    if fsdp:
        values["grpo"] = {**values["grpo"], "fsdp_config": fsdp}
    (folder / f"{name}.yaml").write_text(RunConfig.from_dict(values).to_yaml(), encoding="utf-8")
    return f"{folder / name}.yaml={folder / name}"


def numbers(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights at the end, and what each step logged."""
    (file,) = (folder / "model").glob("*model.safetensors")
    keys = ("loss", "grad_norm", "reward", "kl")
    return load_file(file), [{key: line[key] for key in keys if key in line} for line in log_lines(folder)]


def agree(folder: Path, names: Sequence[str], steps: int) -> None:
    """Weights and logged numbers under FSDP2 are those of plain DDP; the norm of a packed model's gradients is taken in
    bfloat16, which an adapter beside it has."""
    for name in names:
        (weights, lines), (plain, plain_lines) = numbers(folder / name), numbers(folder / f"{name}_ddp")
        assert plain.keys() <= weights.keys() <= {*plain, "lm_head.weight"}  # tied, and saved beside the embeddings
        assert max(float((weights[key] - plain[key]).abs().max()) for key in plain) < SAME, name
        assert len(lines) == len(plain_lines) == steps
        for line, plain_line in zip(lines, plain_lines, strict=True):
            assert line == pytest.approx(plain_line, rel=1e-2 if name == "packed" else 1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Full fine-tunes with images that one rank reads and of an untied model, LoRA offloaded, and LoRA on 4 bits: as
    plain DDP has them."""
    packed = {"model": {"load_in_4bit": True, "dtype": "float32"}}
    configs: dict[str, tuple[RunConfig, dict[str, Any]]] = {
        "whole": (
            picture_config(tiny("qwen3_vl"), tmp_path, {"peft": None}, **SGD),
            {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
        ),
        "untied": (text_config(tiny("llama"), tmp_path, {"peft": None}, **SGD), {"reshard_after_forward": True}),
        "lora": (text_config(tiny("llama"), tmp_path, **SGD), {"cpu_offload": True}),
        "packed": (text_config(tiny("qwen3"), tmp_path, packed, **SGD), {"cpu_ram_efficient_loading": True}),
    }
    pairs = [written(tmp_path, f"{name}_ddp", config) for name, (config, _) in configs.items()]
    pairs += [written(tmp_path, name, config, **fsdp) for name, (config, fsdp) in configs.items()]
    done = launch(*pairs)
    assert done.returncode == 0, done.stderr[-4000:]
    agree(tmp_path, list(configs), 3)
    told = json.loads((tmp_path / "whole" / "facts0.json").read_text())
    assert {"FSDPQwen3VLTextDecoderLayer", "FSDPQwen3VLVisionBlock"} <= set(told["kinds"])
    for name in configs:
        assert json.loads((tmp_path / name / "facts0.json").read_text())["held"] < 0.51, name
        assert json.loads((tmp_path / f"{name}_ddp" / "facts0.json").read_text())["held"] == 1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_other_numbers_of_processes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, then three for a step, then two: what DDP learns on the same way. Then the parts of the three are
    put together, by one process, on which the run's batch is not legal."""
    for processes, steps in ((2, 2), (3, 3), (2, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        adam = {"lr_scheduler_type": "constant", "max_steps": steps, "save_steps": 1, "learning_rate": 1e-3}
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6 // processes}
        lora = text_config(tiny("qwen3"), tmp_path, **batch, **adam, ddp_find_unused_parameters=False)
        full = RunConfig.from_dict({**lora.to_dict(), "peft": None})
        pairs = [written(tmp_path, "lora_ddp", lora), written(tmp_path, "full_ddp", full)]
        pairs += [written(tmp_path, "lora", lora, state_dict_type="FULL_STATE_DICT")]
        pairs += [written(tmp_path, "full", full, state_dict_type="SHARDED_STATE_DICT")]
        done = launch(*(pair + "+" * (steps > 2) for pair in pairs), processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count(f"resuming at step {steps - 1}") == 4 * (steps > 2)
    agree(tmp_path, ["lora", "full"], 4)
    monkeypatch.delenv("WORLD_SIZE")
    parts = tmp_path / "full" / "checkpoints" / "checkpoint-3"
    assert not list(parts.glob("*.safetensors"))
    assert main(["merge", str(parts), str(tmp_path / "merged"), "--rows", "1"]) == 0, capsys.readouterr().err
    (of_ddp,) = (tmp_path / "full_ddp" / "checkpoints" / "checkpoint-3").glob("model.safetensors")
    merged, plain = load_file(tmp_path / "merged" / "model.safetensors"), load_file(of_ddp)
    assert max(float((merged[key] - plain[key]).abs().max()) for key in plain) < SAME
