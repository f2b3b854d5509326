"""`grpo-autotune infer`: vLLM and transformers' `generate` write the same completions with a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from tests.support.real_model import real_model
from tests.support.training import text_config

ENOUGH = 0.99
"""Least share of equal tokens, greedy, in float32."""
QUESTIONS = (
    "What is {n} plus {n}?",
    "Write a sentence about the number {n}.",
    "Which city is the capital of country number {n} in the alphabet?",
    "Name {n} animals.",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter of random weights on SmolLM2-135M-Instruct."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, model = tmp_path_factory.mktemp("infer"), real_model()
    held_out = folder / "held_out.jsonl"
    rows = [{"prompt": text.format(n=n), "answer": str(n)} for n in (3, 4) for text in QUESTIONS]
    held_out.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = text_config(
        model,
        folder,
        {
            "model": {"dtype": "float32"},
            "data": {"eval_path": str(held_out)},
            "rewards": [{"name": "numeric_match"}],
            "vllm": {"max_model_len": 256, "enforce_eager": True},
        },
        use_vllm=True,
        max_completion_length=16,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    torch.manual_seed(0)
    for name, weights in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=0.02)
    text = torch.arange(100, 164)[None]
    with torch.no_grad():
        moved = adapted(text).logits.argmax(-1)
        with adapted.disable_adapter():
            assert (moved == adapted(text).logits.argmax(-1)).float().mean() < ENOUGH, (
                "the adapter changes greedy tokens"
            )
    adapted.save_pretrained(folder / "run" / "model")
    (folder / "run" / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder / "run"


def test_vllm_and_generate_agree_greedily_and_the_adapter_is_in_both(run: Path, tmp_path: Path) -> None:
    ways: dict[str, list[Any]] = {"vllm": [run, "--vllm"], "generate": [run]}
    ids = {name: [*tokens(words, tmp_path / f"{name}.jsonl")] for name, words in ways.items()}
    assert alike(ids["vllm"], ids["generate"]) >= ENOUGH


def tokens(words: list[Any], out: Path) -> Iterator[list[int]]:
    """Ids of each completion."""
    from transformers import AutoTokenizer

    assert main(["infer", *map(str, words), "--greedy", "--out", str(out)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    for number, line in enumerate(map(json.loads, out.read_text(encoding="utf-8").splitlines())):
        assert line["row"] == number and line["rewards"].keys() == {"numeric_match"}
        yield tokenizer(line["completion"])["input_ids"]


def alike(some: list[list[int]], others: list[list[int]]) -> float:
    """Share of the tokens that are the same at the same place."""
    pairs = [pair for both in zip(some, others, strict=True) for pair in zip_longest(*both)]
    return sum(one == other for one, other in pairs) / len(pairs)
