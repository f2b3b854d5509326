"""The file of completions: whole lines stay, a torn one goes, and only the settings that began it go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.trained import Completion, Settings
from grpo_autotune.trained.completions import CompletionFile, alone_with, weights_digest

SETTINGS = Settings(
    checkpoint="run/model",
    weights="1",
    backend="generate",
    data="rows",
    rows="2",
    image_size=None,
    n=2,
    greedy=False,
    sampling={"temperature": 1.0},
    rewards=[],
)


def completion(row: int, sample: int = 0) -> Completion:
    return Completion(
        row=row,
        sample=sample,
        prompt="p\u2028",
        completion="a\r\nb",
        rewards={"r": float(row)},
        failed=[],
        total=float(row),
        tokens=2,
        truncated=False,
        branch=None,
        columns={"answer": float("nan"), "raw": b"\xff"},
    )


def test_lines_come_back_a_torn_last_one_is_cut_off_and_the_rest_is_sorted(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    CompletionFile(path, SETTINGS).add([completion(1), completion(0, 1)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 0')
    again = CompletionFile(path, SETTINGS)
    assert path.read_bytes() == whole
    again.add([completion(0, 0)])
    again.sort()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [(line["row"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0)]
    assert lines[0]["completion"] == "a\r\nb" and lines[0]["columns"] == {"answer": None, "raw": "_w=="}
    assert CompletionFile(path, SETTINGS).completions == again.completions or len(again.completions) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n": 4}, "begun with n 2, and 4 is asked for"),
        ({"sampling": {"temperature": 0.5}}, "begun with temperature 1.0, and 0.5"),
        ({"rows": "3"}, "begun with other rows: the data has changed"),
        ({"weights": "3"}, "begun with other weights"),
    ],
)
def test_other_settings_are_refused_in_one_line(change: dict[str, object], told: str, tmp_path: Path) -> None:
    CompletionFile(tmp_path / "out.jsonl", SETTINGS).add([completion(1)])
    with pytest.raises(ConfigError, match=told):
        CompletionFile(tmp_path / "out.jsonl", SETTINGS.model_copy(update=change))
    assert len(CompletionFile(tmp_path / "out.jsonl", SETTINGS).completions) == 1


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    CompletionFile(tmp_path / "out.jsonl", SETTINGS).add([completion(1)])
    moved = SETTINGS.model_copy(update={"checkpoint": "elsewhere/model"})
    assert len(CompletionFile(tmp_path / "out.jsonl", moved).completions) == 1


def test_the_model_is_known_by_weights_and_settings_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    before = weights_digest(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(b"moments")
    assert weights_digest(tmp_path) == before
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert weights_digest(tmp_path) != before


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not begun by `infer`"):
        CompletionFile(path, SETTINGS)
    other = tmp_path / "out.jsonl"
    CompletionFile(other, SETTINGS).add([completion(0)])
    other.write_bytes(b"{}\n" + other.read_bytes())
    with pytest.raises(ConfigError, match="line 1 is no completion"):
        CompletionFile(other, SETTINGS)
    assert path.read_text() == "mine" and other.read_bytes().startswith(b"{}\n")


def test_a_digest_tells_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = weights_digest(tmp_path)
    file.write_bytes(b"two")
    assert weights_digest(tmp_path) != first
    (tmp_path / "trainer_state.json").write_text("{}")
    file.write_bytes(b"one")
    assert weights_digest(tmp_path) == first
    file.write_bytes(bytes(3 << 20))
    frozen_at_both_ends = weights_digest(tmp_path)
    file.write_bytes(bytes(1 << 20) + bytes([1]) * (1 << 20) + bytes(1 << 20))
    assert weights_digest(tmp_path) != frozen_at_both_ends


def test_one_process_writes_a_file_and_an_empty_one_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with alone_with(path):
        with pytest.raises(ConfigError, match="another process writes it"), alone_with(path):
            pass
        assert CompletionFile(path, SETTINGS.model_copy(update={"n": 3})).completions == []
    assert not path.exists()
    with alone_with(path):
        CompletionFile(path, SETTINGS).add([completion(0)])
    assert len(CompletionFile(path, SETTINGS).completions) == 1
