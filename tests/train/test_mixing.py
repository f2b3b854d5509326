"""Rows that are drawn, mixed and held out, and columns inside columns: each against the rows that they come from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError, ConfigError, DataError
from grpo_autotune.train.data.datasets import load_data, training_rows

GRPO = {"per_device_train_batch_size": 4, "num_generations": 4}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def config(data: dict[str, Any], **grpo: Any) -> RunConfig:
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "exact_match"}], "grpo": {**GRPO, **grpo}}
    return RunConfig.from_dict({**values, "data": data})


def load(said: list[str] | None = None, **data: Any) -> tuple[Any, Any]:
    return load_data(config(data), ([] if said is None else said).append)


def problem(kind: type[AutotuneError], **data: Any) -> str:
    with pytest.raises(kind) as caught:
        load(**data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    return write(tmp_path / "numbers.jsonl", [{"prompt": f"What is {n}?", "answer": n} for n in range(50)])


# Drawn rows


def test_a_share_is_held_out_and_a_part_of_the_rest_is_trained_on(numbers: str) -> None:
    said: list[str] = []
    train, held_out = load(said, path=numbers, split_ratio=0.2)
    assert len(held_out) == 10 and sorted([*train["answer"], *held_out["answer"]]) == list(range(50))
    assert held_out["answer"][:] != list(range(40, 50)) and any("10 of 50 rows are held out" in line for line in said)
    some, again = load(path=numbers, split_ratio=0.2, subsample=0.5)
    assert again["answer"][:] == held_out["answer"][:]
    assert len(some) == 20 and set(some["answer"]) < set(train["answer"])
    assert load(path=numbers, split_ratio=0.2, seed=1)[1]["answer"][:] != held_out["answer"][:]
    assert load(path=numbers, subsample=7)[0]["answer"][:] != load(path=numbers, max_samples=7)[0]["answer"][:]


def test_the_seed_of_training_leaves_drawn_rows_alone(numbers: str) -> None:
    data = {"path": numbers, "split_ratio": 0.2, "subsample": 12}
    one, other = (training_rows(config(data, seed=seed), str)["answer"][:] for seed in (1, 2))
    assert one == other


def test_a_drawn_row_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a" if n != 33 else None} for n in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert "row 33: the prompt is None" in problem(DataError, path=path, split_ratio=0.2)
    assert "leaves none of 1 rows" in problem(DataError, path=write(tmp_path / "one.jsonl", rows[:1]), split_ratio=0.2)


# Columns inside columns


def test_rows_of_verl(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "reward_model": {"style": "rule", "ground_truth": str(n)}}
        for n in range(4)
    ]
    path = str(tmp_path / "train.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    train, _ = load(path=path, columns={"answer": "reward_model.ground_truth"})
    assert train["answer"][:] == ["0", "1", "2", "3"] and train["prompt"][2] == rows[2]["prompt"]
    assert train["reward_model"][1] == rows[1]["reward_model"]
    text = problem(DataError, path=path, columns={"answer": "reward_model.truth"})
    assert f"{path}, row 0: reward_model.truth is not there: truth of {{'style': 'rule'" in text
    text = problem(ConfigError, path=path, columns={"answer": "reward_modl.ground_truth"})
    assert "data.columns.answer: the data has no column reward_modl.ground_truth" in text


def test_conversations_of_other_trainers_with_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    turns = [{"from": "system", "value": "Look."}, {"from": "human", "value": "<image>\nWhich?"}]
    rows = [{"conversations": [*turns, {"from": "gpt", "value": f"It is {n}."}], "images": ["a.png"]} for n in range(3)]
    columns = {"prompt": "conversations.:-1", "answer": "conversations.-1.value"}
    train, _ = load(path=write(tmp_path / "chat.json", rows), columns=columns)
    assert train["answer"][:] == ["It is 0.", "It is 1.", "It is 2."] and len(train[0]["images"]) == 1
    places = [{"type": "image"}, {"type": "text", "text": "\nWhich?"}]
    assert train["prompt"][1] == [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": places},
    ]
    assert "Write columns: {prompt: 'conversations.:-1'}" in problem(ConfigError, path=str(tmp_path / "chat.json"))


def test_values_of_several_types_and_a_row_that_lacks_its_place(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "about": {"gold": gold}} for gold in (1, "two", [3], None)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert load(path=path, columns={"answer": "about.gold"})[0]["answer"][:] == [1, "two", [3], None]
    short = write(tmp_path / "short.jsonl", [{"prompt": "a", "all": [1, 2]}, {"prompt": "b", "all": [1]}])
    text = problem(DataError, path=short, columns={"answer": "all.1"})
    assert f"{short}, row 1: all.1 is not there: 1 of [1]" in text


# Mixtures


def test_an_epoch_has_each_row_and_the_weights(numbers: str, tmp_path: Path) -> None:
    words = write(tmp_path / "words.jsonl", [{"question": f"w{n}", "answer": f"a{n}", "level": n} for n in range(6)])
    mix = {
        "numbers": {"weight": 3, "path": numbers, "split_ratio": 0.2},
        "words": {"weight": 1, "path": words, "columns": {"prompt": "question"}, "system_prompt": "Say."},
    }
    said: list[str] = []
    train, held_out = load(said, path="both", mix=mix)
    counts = Counter(train["dataset"])
    assert counts == {"numbers": 40, "words": 14}
    assert "an epoch of both: 40 of numbers (40 rows), 14 of words (6 rows)" in said
    of_words = Counter(row["answer"] for row in train if row["dataset"] == "words")
    assert set(of_words.values()) == {2, 3} and len(of_words) == 6
    row = next(row for row in train if row["dataset"] == "words")
    assert row["answer"] == f"a{row['level']}" and row["prompt"][0] == {"role": "system", "content": "Say."}
    row = next(row for row in train if row["dataset"] == "numbers")
    assert row["prompt"] == [{"role": "user", "content": f"What is {row['answer']}?"}] and row["level"] is None
    assert held_out["dataset"][:] == ["numbers"] * 10 and not set(held_out["answer"]) & set(train["answer"])
    assert load(path="both", mix=mix)[0][:] == train[:] != load(path="both", mix=mix, seed=1)[0][:]
    fewer = load(path="both", mix=mix, subsample=0.5, max_samples=20)[0]
    assert len(fewer) == 20 and set(fewer["dataset"]) == {"numbers", "words"}


def test_pictures_in_some_rows_one_or_a_list(numbers: str, tmp_path: Path) -> None:
    Image.new("RGB", (28, 56)).save(tmp_path / "a.png")
    one = write(tmp_path / "one.jsonl", [{"prompt": "p", "image": image} for image in ("a.png", None)])
    several = write(tmp_path / "several.jsonl", [{"prompt": "q", "images": ["a.png", "a.png"]}])
    mix: dict[str, Any] = {"one": {"weight": 1, "path": one}, "none": {"weight": 1, "path": numbers}}
    train, _ = load(path="both", mix=mix)
    sizes = {(row["dataset"], row["image"] and row["image"].size) for row in train}
    assert sizes == {("one", (28, 56)), ("one", None), ("none", None)}
    mix["several"] = {"weight": 1, "path": several, "image_size": 28}
    train, _ = load(path="all", mix=mix)
    shown = {(row["dataset"], *(image.size for image in row["images"] or [])) for row in train}
    assert shown == {("one", (28, 56)), ("one",), ("none",), ("several", (14, 28), (14, 28))}


def test_mixtures_that_do_not_go_together(numbers: str, tmp_path: Path) -> None:
    named = write(tmp_path / "named.jsonl", [{"prompt": "p", "dataset": "x"}])
    a = {"weight": 1, "path": numbers}
    text = problem(ConfigError, path="m", mix={"a": a, "b": {"weight": 1, "path": named}})
    assert text.startswith("data.mix.b: a mixture names each row's data set in the column dataset")
    text = problem(ConfigError, path="m", mix={"a": a, "b": {**a, "prompt_format": "text"}})
    assert text.startswith("data.mix: some prompts are messages, and some text")
    text = problem(ConfigError, path="m", mix={"a": a, "b": {**a, "columns": {"prompt": "question"}}})
    assert text.startswith("data.mix.b.columns.prompt: the data has no column question.")
