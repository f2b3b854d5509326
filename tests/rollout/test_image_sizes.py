"""Sizes of a data set's images: every image counts, each header is read once, and what is not known is not guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from grpo_autotune.rollout.colocate import image_sizes as module
from grpo_autotune.rollout.colocate.image_sizes import image_sizes
from grpo_autotune.rollout.colocate.unlock import data_of
from grpo_autotune.seams.stored_images import Limits
from grpo_autotune.train.data.images import prepare_images


@pytest.fixture
def opened(monkeypatch) -> list[Any]:
    """What was opened as an image since."""
    found = []
    plain = Image.open

    def noted(file, *args, **kwargs):
        found.append(file)
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", noted)
    return found


def pictures(folder: Path, *sizes: tuple[int, int]) -> list[str]:
    paths = [str(folder / f"{width}x{height}.png") for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size).save(path)
    return paths


def rows_of(column: str, values: list[Any], decode: bool = True) -> datasets.Dataset:
    image = datasets.Image(decode=decode)
    features = datasets.Features({column: datasets.List(image) if column == "images" else image})
    return datasets.Dataset.from_dict({column: values}, features=features)


def test_each_file_and_each_data_set_is_read_once(tmp_path, opened):
    small, large = pictures(tmp_path, (30, 20), (50, 70))
    train = rows_of("image", [small, None, large, small, large] * 200)
    held_out = rows_of("images", [[small, large], [], None, [Image.new("RGB", (9, 8))]], decode=False)
    assert image_sizes([train]) == {(30, 20), (50, 70)}
    assert sorted(opened) == [small, large]
    assert image_sizes([train, held_out, None]) == {(30, 20), (50, 70), (9, 8)}
    assert len(opened) == 2 + 3
    assert image_sizes([train, held_out]) == image_sizes([held_out, train])
    assert len(opened) == 2 + 3


def test_prepared_rows(tmp_path):
    paths = pictures(tmp_path, (40, 20), (100, 50))
    rows = datasets.Dataset.from_dict({"image": paths, "prompt": ["a", "b"]})
    assert image_sizes([prepare_images(rows, Limits(60), tmp_path, "here", print)]) == {(40, 20), (60, 30)}


def test_the_data_of_a_trainer():
    assert data_of({"train_dataset": 1}) == (1, None)
    assert data_of({"train_dataset": 1, "eval_dataset": {"a": 2, "b": 3}}) == (1, 2, 3)
    assert data_of({"train_dataset": 1, "eval_dataset": 2, "tools": []}) == (1, 2)
    for name in ("tools", "environment_factory", "rollout_func"):
        assert data_of({"train_dataset": 1, name: [print]}) == ()


def test_what_is_not_known(tmp_path, monkeypatch):
    paths = pictures(tmp_path, (30, 20), (50, 70))
    rows = rows_of("image", paths)
    assert image_sizes([datasets.Dataset.from_dict({"prompt": ["a"]})]) == set()
    for other in (
        rows.to_iterable_dataset(),
        rows.with_transform(lambda batch: batch),
        datasets.Dataset.from_dict({"image": paths}),
        rows_of("image", [str(tmp_path / "nowhere.png")]),
        list(rows),
    ):
        assert image_sizes([rows, other]) == set()
    monkeypatch.setattr(module, "MOST_IMAGES", 1)
    assert image_sizes([rows_of("image", paths[::-1])]) == set()
