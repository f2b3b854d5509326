"""`model.adapter`: the words for it, and what cannot be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs.rules import adapter_rule
from grpo_autotune.rollout.server.command import adapter_room
from grpo_autotune.trained.adapter import settled

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "r": 4, "target_modules": ["v", "q"]}


def config(place: Path, peft: dict[str, Any] | None = None, name: str = "owner/name", **model: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": name, "adapter": str(place), **model},
            "data": {"path": "rows.jsonl"},
            "rewards": [{"name": "exact_match"}],
            "peft": peft,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for folder in (tmp_path / "one" / "model", tmp_path / "one" / "checkpoints" / "checkpoint-3"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "one" / "best").symlink_to("checkpoints/checkpoint-3")
    (tmp_path / "one" / "checkpoints" / "checkpoint-3" / "complete.json").write_text('{"files": {}}')
    return tmp_path / "one"


def test_the_words_of_a_user_become_a_folder_of_peft(run: Path) -> None:
    for words, folder in (("", "model"), ("model", "model"), ("best", "checkpoints/checkpoint-3")):
        found = settled(config(run / words), str)
        assert found.model.adapter == str(run / folder)
        assert found.lora == ADAPTER, "what the knobs and checks read in place of a peft section"
        assert settled(found, str) == found


def test_a_base_of_another_name_is_told(run: Path) -> None:
    told: list[str] = []
    settled(config(run, name="copy/of-it"), told.append)
    assert told == ["model.adapter was trained on owner/name, and goes onto copy/of-it"]


def test_a_peft_section_may_say_the_same(run: Path) -> None:
    settled(config(run, {"r": 4, "target_modules": ["q", "v"], "lora_alpha": 8, "use_dora": False}), str)
    settled(config(run, {"target_modules": "all-linear"}), str)
    with pytest.raises(ConfigError, match=r"^peft.r: the adapter to go on from has 4, and this is 8. Remove the peft"):
        settled(config(run, {"r": 8}), str)


def test_its_rank_and_kind_are_known_where_a_peft_section_is_read(run: Path) -> None:
    found = settled(config(run, load_in_4bit=True), str)  # a base in 4 bits is trained under the adapter
    assert adapter_room(found) == 8
    context: Any = type("Context", (), {"config": found})
    assert "is that of the adapter" in str(adapter_rule(context, 8))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nowhere", r"^model.adapter .*nowhere: there is no folder"),
        ("one/checkpoint-9", r"^model.adapter .*: the run has no checkpoint-9"),
        ("whole", r"^model.adapter: .*whole holds whole weights, and no adapter. Write model.name_or_path: "),
        ("empty", r"^model.adapter .*: it holds neither a model nor an adapter"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_line(run: Path, words: str, told: str) -> None:
    (run.parent / "empty").mkdir()
    (run.parent / "whole").mkdir()
    (run.parent / "whole" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=told):
        settled(config(run.parent / words), str)
