"""Data and models that are not where a configuration says, told from the file system alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.places import check_data_place, check_model_place, check_split
from grpo_autotune.errors import AutotuneError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "held_out"]}))
    return tmp_path


def data(path: str, **keys: Any) -> None:
    given = {"name": None, "revision": None, "params": None} | keys
    check_data_place(path, where="data.path", **given)


@pytest.mark.parametrize(
    ("path", "keys", "expected"),
    [
        ("nope.jsonl", {}, "data.path: there is no file or folder nope.jsonl. Paths start from /"),
        ("./nope", {}, "data.path: there is no file or folder ./nope."),
        ("digit", {}, "data.path: there is no data set digit. Nearest: digits."),
        ("rows.txt", {}, "data.path: a file ending in .txt cannot be read. Accepted: .json, .jsonl, .csv, .parquet."),
        ("empty.jsonl", {}, "empty.jsonl: the file is empty"),
        ("rows.jsonl", {"name": "main"}, "data.name: only a data set on the hub has a name"),
        ("saved", {"revision": "v1"}, "data.revision: only a data set on the hub has a revision"),
        ("digits", {"name": "main"}, "data.name: only a data set on the hub has a name, and digits is a registered"),
        ("rows.jsonl", {"params": {"count": 1}}, "data.params: params are for a registered data-set function."),
        ("no_such_module:rows", {}, "no_such_module:rows: cannot import no_such_module for this dataset"),
    ],
)
def test_data_that_cannot_be_there(path: str, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(AutotuneError) as caught:
        data(path, **keys)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("path", "split", "expected"),
    [
        ("rows.jsonl", "test", "data.split: rows.jsonl has no split test. Splits there: train."),
        ("saved", "train+test[:5]", "data.split: saved has no split test. Splits there: train, held_out."),
        ("digits", "validation", "data.split: digits has no split validation. Splits there: train, test."),
    ],
)
def test_a_split_that_is_not_there(path: str, split: str, expected: str) -> None:
    with pytest.raises(AutotuneError) as caught:
        check_split(path, split, "data.split")
    assert str(caught.value) == expected


def test_what_may_be_there_passes() -> None:
    for path in ("rows.jsonl", "saved", "digits", "openai/gsm8k", "owner/digits", "."):
        data(path)
    for path, split in (("saved", "held_out[:10%]"), ("rows.jsonl", None), ("openai/gsm8k", "x"), ("digits", "all")):
        check_split(path, split, "data.split")
    for name in ("demo", "Qwen/Qwen3-0.6B", ".", "my_models:tiny"):
        check_model_place(name)


def test_the_home_is_written_as_in_a_shell(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    data("~/rows.jsonl")
    check_model_place("~/saved")


@pytest.mark.parametrize("path", ["x" * 999, "a/" * 500 + "b", "~no-such-user/rows.jsonl"])
def test_a_text_that_cannot_be_a_path(path: str) -> None:
    with pytest.raises(AutotuneError, match="there is no file or folder"):
        data(path)
    with pytest.raises(AutotuneError, match="is not a folder with a model"):
        check_model_place(path)


@pytest.mark.parametrize("name", ["./nope", "/nope", "~/nope", "a/b/c", "rows.jsonl"])
def test_a_model_folder_that_is_none(name: str) -> None:
    with pytest.raises(AutotuneError, match=rf"^model\.name_or_path: {name} is not a folder with a model"):
        check_model_place(name)


def test_an_adapter_alone_names_its_base_model(here: Path) -> None:
    (here / "adapter").mkdir()
    config = here / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": 4}, indent=2))
    with pytest.raises(AutotuneError, match=r"^model\.name_or_path: adapter holds an adapter of Qwen/Qwen3-0\.6B, and"):
        check_model_place("adapter")
    with pytest.raises(AutotuneError, match=r"go on from this adapter, write model\.adapter: adapter beside it"):
        check_model_place("adapter")
    config.write_text("broken")
    with pytest.raises(AutotuneError, match="an adapter of its base model"):
        check_model_place("adapter")
    (here / "adapter" / "config.json").write_text("{}")
    check_model_place("adapter")
