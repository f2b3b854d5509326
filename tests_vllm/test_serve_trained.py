"""`grpo-autotune serve RUN_DIR` for real: an adapter with layers of the vision tower, checked against the trainer."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.commands import serve
from grpo_autotune.errors import EnvironmentProblem
from tests.support.training import picture_config


def save_adapter(model: Path, folder: Path, seed: int) -> None:
    """An adapter whose weights are as large as the model's own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    base = AutoModelForImageTextToText.from_pretrained(model)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder)


def test_the_answer_is_the_trainers_and_a_wrong_adapter_is_caught(
    served: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = served("qwen3_vl"), tmp_path / "pictures"
    save_adapter(model, run / "model", seed=1)
    (run / "config.yaml").write_text(picture_config(model, tmp_path).to_yaml())
    caught: list[str] = []

    def once_it_is_checked(address: str, name: str) -> None:
        from grpo_autotune.trained.agreement import check_answer
        from grpo_autotune.trained.answer import trainers_answer
        from grpo_autotune.trained.source import find_trained

        save_adapter(model, run / "model", seed=2)
        with pytest.raises(EnvironmentProblem, match="answers as another model") as wrong:
            check_answer(address, name, trainers_answer(find_trained(run), str), str)
        caught.append(str(wrong.value))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(serve, "_say_how_to_ask", once_it_is_checked)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent), os.environ["PYTHONPATH"]]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        keys = {"server_port": free.getsockname()[1], "max_model_len": 512, "enforce_eager": "true"}
    assert (
        main(["serve", str(run), *(word for key, value in keys.items() for word in ("--set", f"vllm.{key}={value}"))])
        == 130
    )
    text = capsys.readouterr().err
    assert "--max-lora-rank 8 --max-loras 1 --enable-tower-connector-lora" in text
    assert "checked on training row" in text and "16 of 16 greedy tokens are the trainer's" in text
    assert "cannot tell" not in text and caught
