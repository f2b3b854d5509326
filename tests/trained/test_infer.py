"""`grpo-autotune infer`: what it writes is the model's own, none is written twice, and every mistake is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.trained.engine import Answer
from grpo_autotune.trained.infer import Scorer
from tests.support.training import picture_config, text_config

ROOT = Path(__file__).parents[2]
HELD_OUT = {"data": {"eval_split": "train"}}
REWARDS = {"rewards": [{"name": "tests.support.training:uneven"}, {"name": "exact_match", "weight": 0.5}]}
KILLED_TWICE = """
import os, sys
from grpo_autotune.cli.main import main
import grpo_autotune.trained.infer
for _ in range(2):
    if not (child := os.fork()):
        os._exit(main(sys.argv[1:]))
    print(os.waitpid(child, 0)[1], len(open(sys.argv[-1]).readlines()), flush=True)
"""
"""Runs the command twice, and tells how it ended and how many lines there are then."""
Make = Callable[..., RunConfig]


def saved_run(model: Path, folder: Path, make: Make) -> Path:
    """A run folder with an adapter of random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder.mkdir()
    kind = AutoModelForCausalLM if make is text_config else AutoModelForImageTextToText
    adapted = get_peft_model(kind.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, weights in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=0.2)
    adapted.save_pretrained(folder / "run" / "model")
    config = make(model, folder, {**HELD_OUT, **REWARDS, "speedups": "auto"})
    (folder / "run" / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tiny("qwen3"), tmp_path_factory.mktemp("infer") / "text", text_config)


def completions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_a_file_of_two_kills_is_that_of_a_run_left_alone(run: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    words = ["infer", str(run), "--n", "2", "--batch-size", "4", "--out"]
    kill = {"KILL_AT_CALL": "2", "KILL_SIGNAL": str(int(signal.SIGKILL))}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_TWICE, *words, str(out)],
        cwd=ROOT, env={**os.environ, **kill}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["9", "4", "9", "8"], done.stderr
    with out.open("a") as file:
        file.write('{"row": 1, "sam')
    assert main([*words, str(out)]) == main([*words, str(alone)]) == 0
    assert out.read_bytes() == alone.read_bytes()
    assert [(one["row"], one["sample"]) for one in completions(out)] == [(n, i) for n in range(8) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_greedy_completions_are_those_of_the_adapted_model_row_by_row(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
    from trl.data_utils import prepare_multimodal_messages

    from grpo_autotune.train.data.datasets import load_data

    pictured = kind == "qwen3_vl"
    run = saved_run(tiny(kind), tmp_path / "run", picture_config if pictured else text_config)
    out = tmp_path / "out.jsonl"
    assert main(["infer", str(run), "--greedy", "--out", str(out), "--max-new-tokens", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    config = RunConfig.from_yaml((run / "config.yaml").read_text())
    processor = AutoProcessor.from_pretrained(tiny(kind))
    base = (AutoModelForImageTextToText if pictured else AutoModelForCausalLM).from_pretrained(tiny(kind))

    def greedy(model: Any, row: dict[str, Any]) -> str:
        prompt = prepare_multimodal_messages(row["prompt"], [row["image"]]) if pictured else row["prompt"]
        form = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = processor.apply_chat_template(prompt, **form)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    rows = list(load_data(config, lambda line: None)[0])
    of_base = [greedy(base, row) for row in rows]
    adapted = PeftModel.from_pretrained(base, run / "model").eval()
    written = completions(out)
    assert [one["completion"] for one in written] == [greedy(adapted, row) for row in rows] != of_base
    assert told["completions"] == told["written"] == len(rows) and not told["settings"]["sampling"]["generation_kwargs"]
    assert [score["reward"] for score in told["scores"]] == ["uneven", "exact_match", "total"]
    mean = sum(one["rewards"]["uneven"] + 0.5 * one["rewards"]["exact_match"] for one in written) / len(rows)
    assert told["scores"][-1]["mean"] == pytest.approx(mean)


@pytest.mark.slow
def test_whole_weights_outside_a_run_and_data_without_the_columns_of_rewards(run: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "plain.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "What is one?"}\n{"prompt": "What is two plus one?"}\n', encoding="utf-8")
    config = RunConfig.from_yaml((run / "config.yaml").read_text())
    more = ["--config", str(run / "config.yaml"), "--data", str(data), "--no-rewards", "--out", str(out)]
    assert main(["infer", str(config.model.name_or_path), *more]) == 0
    assert [(one["row"], one["rewards"], one["total"]) for one in completions(out)] == [(0, {}, None), (1, {}, None)]


async def fails_on_even(completions: list[Any], number: list[int], **columns: Any) -> list[float | None]:
    if any(one % 2 == 0 for one in number):
        raise OSError("no answer")
    return [float(one) for one in number]


def answers(texts: list[str]) -> list[Answer]:
    return [Answer("p", text, [{"role": "assistant", "content": text}], [1], False) for text in texts]


def test_each_branch_is_judged_by_its_own_rewards_and_a_failed_score_is_none(tmp_path: Path) -> None:
    values = {
        "model": {"name_or_path": "none"},
        "data": {"path": "none.jsonl"},
        "rewards": [
            {"name": "exact_match"},
            {"name": f"{__name__}:fails_on_even", "weight": 2.0, "on_failure": "drop"},
        ],
        "grpo": {"beta": 0.1},
        "branches": {"column": "kind", "a": {"rewards": ["exact_match"]}, "b": {"rewards": ["fails_on_even"]}},
    }
    messages = [{"role": "user", "content": "?"}]
    rows = [
        {"prompt": messages, "kind": kind, "answer": "4", "number": number}
        for kind, number in (("a", 1), ("b", 3), ("b", 4))
    ]
    data = datasets.Dataset.from_list(rows)
    with Scorer(RunConfig.from_dict(values), data, "rows") as scorer:
        assert scorer.branches == ["a", "b", "b"]
        first = list(scorer(rows[:2], answers(["4", "4"])))
        second = list(scorer(rows[2:], answers(["4"])))
    none = {"exact_match": None, "fails_on_even": None}
    assert first == [
        {"rewards": {**none, "exact_match": 1.0}, "failed": [], "total": 1.0},
        {"rewards": {**none, "fails_on_even": 3.0}, "failed": [], "total": 6.0},
    ]
    assert second == [{"rewards": none, "failed": ["fails_on_even"], "total": None}]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A run folder whose weights nobody could load: what is refused is refused before."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "none"}')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is one?"}\n', encoding="utf-8")
    config = text_config(tmp_path / "none", tmp_path, {"rewards": [{"name": "exact_match"}]})
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--greedy", "--n", "2"], "greedy completions of a prompt are all the same"),
        (["run", "--out", "nowhere/out.jsonl"], "this is no place for a file"),
        (["run"], "--data: the run has no held-out sets. Name a file"),
        (["run", "--data", "none.jsonl"], "--data: "),
        (["run", "--data", "rows.jsonl"], "the data has no column answer"),
        (["run/model", "--set", "grpo.beta"], "--set"),
        (["run", "--config", "none.yaml"], "none.yaml"),
        (["elsewhere"], "there is no folder elsewhere"),
        (["whole"], "no config.yaml of a run says how to read data and score. Name the run's: --config"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapter.parent)
    (adapter.parent / "whole").mkdir()
    (adapter.parent / "whole" / "config.json").write_text("{}")
    assert main(["infer", "--out", "out.jsonl", *words]) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("reading ", "start-up"))]
    assert len(lines) == 1 and told in lines[0], lines
    assert not list(adapter.parent.glob("out*"))
