"""`grpo-autotune data`: the rows as the trainer tokenizes them, and what rewards say of the reference answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.config.yaml_text import write_yaml
from grpo_autotune.records.data import DataView
from grpo_autotune.train.trainer import build_trainer
from tests.support.training import picture_config, text_config

pytestmark = pytest.mark.slow

REWARDS = [
    {"name": "exact_match"},
    {"name": "numeric_match", "params": {"column": "wrong"}},
    {"name": "format"},
    {"name": "tests.commands.test_data:half"},
]


def half(answer: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Half of what there is to have, but for one answer; it is given the reference's tokens."""
    return [0.25 if one == "2" else 0.5 * bool(ids) for one, ids in zip(answer, completion_ids, strict=True)]


def viewed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["data", *map(str, words), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    DataView.model_validate(document)
    return document


def test_text_tokens_and_references(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(tiny("qwen3"), tmp_path, {"rewards": REWARDS})
    rows = Path(config.data.path)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps({**row, "wrong": "one"}) + "\n" for row in lines))
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(config.to_dict() | {"output": {"dir": str(tmp_path / "run")}}))
    document = viewed(capsys, path)
    trainer = build_trainer(config)
    ids = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:])[0]
    assert document["prompt_tokens"] == {str(row): len(tokens) for row, tokens in enumerate(ids)}
    assert [row["row"] for row in document["shown"]][::2] == [0, 7]
    assert document["shown"][0]["text"] == trainer.processing_class.decode(ids[0])
    scores = {one["name"]: one for one in document["rewards"]}
    assert scores["exact_match"]["reads"] == ["answer"] and set(scores["exact_match"]["scores"].values()) == {1.0}
    assert scores["exact_match"]["note"] is None and scores["format"]["note"] is None
    assert scores["numeric_match"]["reference"] == "wrong"
    assert scores["numeric_match"]["note"] == "it gives no score to any"
    assert scores["half"]["scores"]["2"] == 0.25
    assert scores["half"]["note"] == "its own reference has less than 0.5 in 1 row, the first row 2"
    assert viewed(capsys, path, "--row", 5)["shown"][0]["row"] == 5
    assert main(["data", str(path), "--row", "8"]) == 2
    assert "--row 8: there are 8 rows. Count from 0." in capsys.readouterr().err


def test_images_as_they_are_resized(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"data": {"image_size": 56}, "rewards": REWARDS[:1]}
    config = picture_config(tiny("qwen2_5_vl"), tmp_path, changes)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    capsys.readouterr()
    assert main(["data", str(path), "--rows", "4"]) == 0
    text = capsys.readouterr().out
    document = viewed(capsys, path, "--rows", 4)
    assert [row["images"] for row in document["shown"]] == [
        [{"width": 56, "height": 56 if n % 2 == 0 else 37, "tokens": 4 if n % 2 == 0 else 2}] for n in range(4)
    ]
    assert "<|image_pad|> x4<|vision_end|>What is ?" in text and "  image: 56 x 37, 2 tokens" in text
    assert "exact_match   answer   answer   4      1      1" in text
