"""A run that goes on from a trained adapter (`model.adapter`): equal to TRL given the same `PeftModel`, and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.sync.weights import engine_name
from grpo_autotune.train.models.adapter import REFERENCE
from grpo_autotune.train.trainer import build_trainer, run_training
from tests.support.adapters import saved_adapter
from tests.support.tiny import tiny_model
from tests.support.training import log_lines, text_config, uneven

pytestmark = pytest.mark.slow

LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and the folder of two steps of LoRA on it."""
    folder = tmp_path_factory.mktemp("stages")
    model = tiny_model("qwen3", folder)
    run_training(text_config(model, folder, {"peft": LORA}, max_steps=2, learning_rate=0.1), folder / "one")
    return model, folder / "one"


def stage_2(stage_1: tuple[Path, Path], folder: Path, changes: dict[str, Any] | None = None, **grpo: Any) -> RunConfig:
    model, run = stage_1
    keys = {"model": {"adapter": str(run / "model")}, "speedups": "none", "peft": None, **(changes or {})}
    return text_config(model, folder, keys, **{"max_steps": 2, **grpo})


def plain(config: RunConfig, model: Path, adapter: Path) -> list[dict[str, Any]]:
    """The log of TRL's own trainer, given the adapter as a `PeftModel` and everything else as `config` has it."""
    ours = build_trainer(config)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter), is_trainable=True)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[uneven],
        args=ours.args,
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


COMPARED = ("loss", "kl", "reward", "grad_norm", "entropy")


def told(lines: list[dict[str, Any]]) -> list[list[float]]:
    return [[line[name] for name in COMPARED] for line in lines if "loss" in line]


def test_it_learns_what_trl_learns_from_the_same_peft_model(stage_1: tuple[Path, Path], tmp_path: Path) -> None:
    model, run = stage_1
    said: list[str] = []
    config = stage_2(stage_1, tmp_path)
    trainer = build_trainer(config, say=said.append)
    assert any("the reference model is this adapter as it is at the start" in line for line in said)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all(".default." in name for name in trained)
    run_training(config, tmp_path / "two")
    expected = plain(stage_2(stage_1, tmp_path), model, run / "model")
    assert told(log_lines(tmp_path / "two")) == told(expected)
    assert expected[0]["kl"] == pytest.approx(0, abs=1e-6), "stage 1 is its own reference before the first step"
    run_training(stage_2(stage_1, tmp_path, {"speedups": "auto"}), tmp_path / "fast")
    for fast, slow in zip(told(log_lines(tmp_path / "fast")), told(expected), strict=True):
        assert fast == pytest.approx(slow, rel=1e-3, abs=1e-5)


def logps(model: Any) -> torch.Tensor:
    tokens = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens).logits, -1)


def test_the_base_as_reference(stage_1: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    config = stage_2(stage_1, tmp_path, {"model": {"adapter": str(stage_1[1] / "model"), "adapter_reference": "base"}})
    trainer = build_trainer(config, say=said.append)
    assert any("the reference model is the base model without it" in line for line in said)
    assert REFERENCE not in trainer.model.peft_config
    base = AutoModelForCausalLM.from_pretrained(stage_1[0])
    stage_1_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stage_1[0]), stage_1[1] / "model")
    torch.testing.assert_close(logps(trainer.model), logps(stage_1_model))
    with trainer.model.disable_adapter():
        torch.testing.assert_close(logps(trainer.model), logps(base))
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 1e-3, "stage 1 has left the base"


def test_a_resumed_run_keeps_the_reference(
    stage_1: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage_2(stage_1, tmp_path, max_steps=3, save_steps=2)
    run_training(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-3", ignore_errors=True)
    result = run_training(config, tmp_path / "cut", resume=True)
    assert result.resumed_from == 2
    assert told(log_lines(tmp_path / "cut")) == told(log_lines(tmp_path / "whole"))
    base = {"adapter": str(stage_1[1] / "model"), "adapter_reference": "base"}
    trainer = build_trainer(stage_2(stage_1, tmp_path, {"model": base}))
    trainer._load_from_checkpoint(str(tmp_path / "whole" / "checkpoints" / "checkpoint-2"))
    assert REFERENCE not in trainer.model.peft_config, "the checkpoint's reference is not asked for"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("shape", ["dora", "embeddings", "saved embeddings"])
def test_the_reference_is_the_whole_adapter(stage_1: tuple[Path, Path], tmp_path: Path, shape: str) -> None:
    adapter = saved_adapter(stage_1[0], shape, tmp_path / "adapter")
    model = build_trainer(stage_2(stage_1, tmp_path, {"model": {"adapter": str(adapter)}})).model
    learned = logps(model)
    with use_adapter(model, REFERENCE):
        torch.testing.assert_close(logps(model), learned, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "why"), [("bias", "it has biases"), ("both ends", "it ties weights of its own")])
def test_an_adapter_that_cannot_be_a_reference(
    stage_1: tuple[Path, Path], tmp_path: Path, shape: str, why: str
) -> None:
    adapter = saved_adapter(stage_1[0], shape, tmp_path / "adapter")
    keys = {"model": {"adapter": str(adapter)}}
    with pytest.raises(ConfigError, match=f"TRL cannot copy this adapter.*{why}.*grpo.beta: 0"):
        build_trainer(stage_2(stage_1, tmp_path, keys))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_single_tokens_are_trained_where_the_output_layer_is_not_tied_to_them(
    stage_1: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = saved_adapter(stage_1[0], "tokens", tmp_path / "adapter")
    tokens = {"peft": {**LORA, "trainable_token_indices": [5, 6]}}
    second = stage_2(stage_1, tmp_path, {"model": {"adapter": str(adapter)}})
    for config in (text_config(stage_1[0], tmp_path, tokens), second):
        with pytest.raises(ConfigError, match=r"^peft.trainable_token_indices: TRL's loss cannot train single tokens"):
            build_trainer(config)
    run_training(text_config(tiny_model("llama", tmp_path), tmp_path, tokens, max_steps=1), tmp_path / "run")
    assert len(log_lines(tmp_path / "run")) == 1


def test_the_reference_is_kept_from_an_engine(stage_1: tuple[Path, Path]) -> None:
    """Modules that an adapter trains whole are in the reference as well, and an engine has one place for them."""
    base = AutoModelForCausalLM.from_pretrained(stage_1[0])
    names = sorted(name for name, _ in base.named_parameters())
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    model = get_peft_model(base, lora)
    model.add_adapter(REFERENCE, lora)
    assert sorted(filter(None, (engine_name(model, name) for name, _ in model.named_parameters()))) == names


def cut_short(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (cut_short, "qwen3", "does not fit"),
        (without_weights, "qwen3", "does not fit"),
        (lambda adapter: None, "wider", "size mismatch for"),
        (lambda adapter: None, "deeper", "the adapter has no "),
        (lambda adapter: None, "shallower", "the model has no "),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    stage_1: tuple[Path, Path], tmp_path: Path, harm: Callable[[Path], None], kind: str, message: str
) -> None:
    from tests.support import tiny

    sizes = {"wider": {"hidden_size": 128}, "deeper": {"num_hidden_layers": 3}, "shallower": {"num_hidden_layers": 1}}
    model = stage_1[0]
    if kind in sizes:
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(tiny.CONFIGS, kind, tiny.CONFIGS["qwen3"] | sizes[kind])
            model = tiny_model(kind, tmp_path)
    adapter = tmp_path / "adapter"
    shutil.copytree(stage_1[1] / "model", adapter)
    harm(adapter)
    config = stage_2((model, stage_1[1]), tmp_path, {"model": {"adapter": str(adapter)}})
    with pytest.raises(ConfigError, match=message) as error:
        build_trainer(config)
    assert "\n" not in str(error.value) and str(error.value).startswith("model.adapter")
