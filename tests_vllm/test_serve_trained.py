"""`grpo-autotune serve RUN_DIR` for real: an adapter with layers of the vision tower, checked against the trainer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.trained.agreement import check_answer
from grpo_autotune.trained.answer import trainers_answer
from grpo_autotune.trained.source import find_trained
from tests.support.training import picture_config
from tests_vllm.conftest import ENV_FOLDER

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 240.0


def save_adapter(model: Path, folder: Path, seed: int) -> None:
    """An adapter whose weights are as large as the model's own."""
    torch.manual_seed(seed)
    base = AutoModelForImageTextToText.from_pretrained(model)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder)


def test_the_answer_is_the_trainers_and_a_wrong_adapter_is_caught(
    served: Callable[[str], Path], tmp_path: Path
) -> None:
    model, run = served("qwen3_vl"), tmp_path / "pictures"
    save_adapter(model, run / "model", seed=1)
    (run / "config.yaml").write_text(picture_config(model, tmp_path).to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "said.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ENV_FOLDER}"}
    settings = ["--set", f"vllm.server_port={port}", "--set", "vllm.max_model_len=512"]
    with log.open("wb") as said:
        command = subprocess.Popen(
            [sys.executable, "-m", "grpo_autotune", "serve", str(run), *settings],
            cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while "Ctrl-C ends it" not in log.read_text():
            assert command.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        text = log.read_text()
        assert "--max-lora-rank 8 --max-loras 1 --enable-tower-connector-lora" in text
        assert "checked on training row" in text and "16 of 16 greedy tokens are the trainer's" in text
        assert "cannot tell" not in text
        save_adapter(model, run / "model", seed=2)
        wrong = trainers_answer(find_trained(run), str)
        with pytest.raises(EnvironmentProblem, match="answers as another model"):
            check_answer(f"http://127.0.0.1:{port}", "pictures", wrong, str)
        command.send_signal(signal.SIGINT)
        assert command.wait(timeout=60) == 130
    finally:
        command.kill()
        command.wait()
