"""Image columns without decoding: lists and single images, missing ones, and sizes from headers."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import Image

from grpo_autotune.seams import stored_images
from grpo_autotune.seams.stored_images import header_size, image_column, scaled


def test_a_column_of_either_kind_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_images, "BATCH_ROWS", 2)
    path, buffer = tmp_path / "a.png", BytesIO()
    Image.new("RGB", (30, 20)).save(path)
    Image.new("RGB", (9, 8)).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [str(path), None, str(path)], "images": [[stored, stored], None, []]})
    rows = rows.cast_column("image", datasets.Image()).cast_column("images", datasets.List(datasets.Image()))
    single, lists = image_column(rows, "image"), image_column(rows, "images")
    assert (single.several, lists.several) == (False, True)
    assert [[len(row) for row in batch] for _, batch in single.batches()] == [[1, 1], [1]]
    assert [[len(row) for row in batch] for _, batch in lists.batches()] == [[2, 0], [0]]
    sizes = [header_size(i) for c in (single, lists) for _, batch in c.batches() for row in batch for i in row if i]
    assert sizes == [(30, 20), (30, 20), (9, 8), (9, 8)]


def test_a_column_of_something_else() -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        image_column(datasets.Dataset.from_dict({"image": [1, 2]}), "image")


@pytest.mark.parametrize("longest", [56, 255, 256, 1000, 4096])
@pytest.mark.parametrize("short", [1, 2, 3, 7, 16, 21])
def test_scaling_makes_no_thin_image_thinner(short: int, longest: int) -> None:
    for long in (100 * short + 1, 187 * short + 3, 200 * short, 1333 * short):
        width, height = scaled((long, short), longest)
        assert width == longest and (width / height <= long / short or height == 1)
        assert scaled((short, long), longest) == (height, width)
        assert abs(height - short * longest / long) < 1 or height == 1
    assert scaled((400, 301), longest) == (longest, round(301 * (longest / 400)))
