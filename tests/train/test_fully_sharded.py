"""Training under FSDP2 on two processes: the losses and weights of plain DDP, and checkpoints that go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_autotune.config.schema import RunConfig
from tests.support.training import log_lines, picture_config, text_config

ROOT = Path(__file__).parents[2]
SGD = {
    "optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "save_steps": 2, "ddp_find_unused_parameters": False,
}  # fmt: skip
SAME = 2e-6
"""Largest difference of a weight in float32 after three steps, where FSDP adds up gradients in another order."""


def launch(*pairs: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A full fine-tune with images, and LoRA: as plain DDP has them."""
    seeing = picture_config(tiny("qwen3_vl"), tmp_path, {"peft": None}, **SGD)
    adapted = text_config(tiny("llama"), tmp_path, **SGD)
    pairs = [
        written(tmp_path, "whole_ddp", seeing),
        written(tmp_path, "whole", seeing, state_dict_type="SHARDED_STATE_DICT"),
        written(tmp_path, "lora_ddp", adapted),
        written(tmp_path, "lora", adapted, state_dict_type="FULL_STATE_DICT"),
    ]
    done = launch(*pairs)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("whole", "lora"):
        (weights, steps), (plain, plain_steps) = numbers(tmp_path / name), numbers(tmp_path / f"{name}_ddp")
        assert plain.keys() <= weights.keys() <= {*plain, "lm_head.weight"}  # tied, and saved beside the embeddings
        assert max(float((weights[key] - plain[key]).abs().max()) for key in plain) < SAME, name
        assert len(steps) == len(plain_steps) == 3
        for step, plain_step in zip(steps, plain_steps, strict=True):
            assert step == pytest.approx(plain_step, rel=1e-5, abs=1e-6)
    told = json.loads((tmp_path / "whole" / "facts0.json").read_text())
    assert told["held"] < 0.51 and {"FSDPQwen3VLTextDecoderLayer", "FSDPQwen3VLVisionBlock"} <= set(told["kinds"])
    assert json.loads((tmp_path / "whole_ddp" / "facts0.json").read_text())["held"] == 1
