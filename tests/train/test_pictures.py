"""Images wherever people put them, of every mode and shape: as meant before the model, or one line with the row."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import DataError
from grpo_autotune.train.data.datasets import load_data
from grpo_autotune.train.models.load import load_processor
from grpo_autotune.train.trainer import build_trainer
from tests.support.training import picture_config

RAMP = np.linspace(0, 1, 80 * 40, dtype=np.float32).reshape(40, 80)
SHADES = np.rint(RAMP.astype(np.float64) * 255)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of three sizes."""
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for n in (1, 2, 3):
        Image.new("RGB", (10 * n, 10), (80 * n, 0, 9)).save(tmp_path / f"{n}.png")
    return tmp_path


def load(folder: Path, rows: list[dict[str, Any]], told: list[str] | None = None, **data: Any) -> datasets.Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", **row}) + "\n" for row in rows))
    values = {
        "model": {"name_or_path": "m"},
        "rewards": [{"name": "format"}],
        "grpo": {"per_device_train_batch_size": 2, "num_generations": 2},
        "data": {"path": str(path), **data},
    }
    return load_data(RunConfig.from_dict(values), (told if told is not None else []).append)[0]


def problem(folder: Path, rows: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, rows, **data)
    text = str(caught.value)
    assert len(text) < 400 and str(folder / "rows.jsonl") in text and "iVBOR" not in text
    return text


def shown(rows: datasets.Dataset) -> list[list[int]]:
    """Width of each image of each row, in tens of pixels."""
    values = rows["images"] if "images" in rows.column_names else [[image] for image in rows["image"]]
    return [[image.width // 10 for image in row if image is not None] for row in values]


def encoded(folder: Path, n: int) -> str:
    return base64.b64encode((folder / f"{n}.png").read_bytes()).decode()


# Places


def asked(*parts: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "p"}]}]}


@pytest.mark.parametrize(
    ("rows", "column", "expected"),
    [
        ([{"image": ["1.png", "2.png"]}, {"image": ["3.png"]}], "images", [[1, 2], [3]]),
        ([{"images": "1.png"}, {"images": "3.png"}], "image", [[1], [3]]),
        ([{"images": "1.png"}, {"images": ["2.png", "3.png"]}, {"images": None}], "images", [[1], [2, 3], []]),
        ([{"image": "1.png"}, {"images": ["2.png", "3.png"]}, {}], "images", [[1], [2, 3], []]),
        ([{"image": {"url": "1.png"}}, {"image": {"url": "3.png"}}], "images", [[1], [3]]),
        ([{"image": {"path": "2.png"}}], "image", [[2]]),
    ],
)
def test_one_image_or_a_list_in_either_column(
    rows: list[dict[str, Any]], column: str, expected: list[list[int]], here: Path
) -> None:
    loaded = load(here, rows)
    assert shown(loaded) == expected
    assert {"image", "images"} & set(loaded.column_names) == {column}


@pytest.mark.parametrize(
    ("make", "column"),
    [
        (lambda folder, n: encoded(folder, n), "image"),
        (lambda folder, n: f"data:image/png;base64,{encoded(folder, n)}", "image"),
        (lambda folder, n: encoded(folder, n).replace("+", "-").replace("/", "_").rstrip("="), "image"),
        (lambda folder, n: {"bytes": encoded(folder, n), "path": None}, "image"),
        (lambda folder, n: (folder / f"{n}.png").as_uri(), "image"),
        (lambda folder, n: str(folder / f"{n}.png"), "image"),
    ],
    ids=["base64", "data URI", "base64 for URLs", "bytes in base64", "file URI", "path"],
)
def test_an_image_as_text(make: Callable[[Path, int], Any], column: str, here: Path) -> None:
    assert shown(load(here, [{"image": make(here, n)} for n in (1, 3, 1)])) == [[1], [3], [1]]
    assert shown(load(here, [{"image": make(here, n)} for n in (1, 3, 1)], image_size=20)) == [[1], [2], [1]]


@pytest.mark.filterwarnings("ignore:Downcasting array")  # of `datasets`
@pytest.mark.parametrize("name", ["image", "images"])
def test_an_array_of_pixels_is_one_image(name: str, here: Path) -> None:
    pixels = [[0, 100, 200], [255, 7, 9]]
    row = load(here, [{name: pixels if name == "image" else [pixels]}])[0]
    image = row["image"] if name == "image" else row["images"][0]
    assert np.asarray(image).tolist() == pixels


def test_a_file_whose_name_could_be_base64(here: Path) -> None:
    name = "sha256-" + "0123456789abcdef" * 4
    (here / name).write_bytes((here / "2.png").read_bytes())
    assert shown(load(here, [{"image": name}])) == [[2]]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "2.png"},
        {"type": "image", "url": "2.png"},
        {"type": "image", "path": "2.png"},
        {"type": "image_url", "image_url": {"url": "2.png"}},
        {"type": "image", "base64": "2"},
    ],
    ids=lambda part: list(part)[1],
)
def test_images_inside_parts_keep_their_places(part: dict[str, Any], here: Path) -> None:
    part = {key: encoded(here, 2) if key == "base64" else value for key, value in part.items()}
    place = {"type": "image"}
    loaded = load(here, [asked(place, part, place) | {"images": ["1.png", "3.png"]}, asked(part) | {"images": []}])
    assert shown(loaded) == [[1, 2, 3], [2]]
    kinds = [[piece["type"] for piece in row[0]["content"]] for row in loaded["prompt"]]
    assert kinds == [["image"] * 3 + ["text"], ["image", "text"]]
    assert set(loaded[0]["prompt"][0]["content"][0]) == {"type"}  # TRL fills no place that has another key


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"image": "https://e.org/a.png"}], "row 0: the images cannot be used: https://e.org/a.png is a URL"),
        (
            [{"image": "1.png"}, {"image": "1.png", "images": ["2.png"]}],
            "row 1: the images cannot be used: both image and",
        ),
        (
            [{"images": ["1.png"]}, {"images": ["1.png", None]}],
            "row 1: the images cannot be used: it is given as NoneType",
        ),
        ([{"image": {"url": None, "id": 3}}], "row 0: the images cannot be used: it is given as NoneType"),
        (
            [{"image": "1.png"}, {"image": "data:image/png,abc"}],
            "row 1: the images cannot be used: a text of 18 characters",
        ),
        (
            [{"image": "1.png"}, {"image": "iVBOR" * 20}],
            "row 1: cannot read the image (base64): cannot identify image file",
        ),
        ([{"image": "%iVBOR" * 2000}], "row 0: the images cannot be used: a text of 12000 characters"),
        ([asked({"type": "image"})], "row 0: the images cannot be used: Number of images provided (0) does not match"),
        (
            [asked({"type": "image"}) | {"images": ["1.png", "2.png"]}],
            "(2) does not match number of image placeholders (1)",
        ),
        ([{"image": [["1.png"]]}], "the column image holds List("),
    ],
)
def test_images_that_cannot_be_used(rows: list[dict[str, Any]], expected: str, here: Path) -> None:
    assert expected in problem(here, rows)


# Modes


def tiff(folder: Path, image: Image.Image) -> list[dict[str, Any]]:
    image.save(folder / "x.tif")
    return [{"image": "x.tif"}]


@pytest.mark.parametrize("size", [None, 80])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.rint(RAMP * 60000).astype(np.uint16), SHADES),
        (np.rint(RAMP * 60000).astype(np.int32), SHADES),
        (np.rint(RAMP * 60000).astype(np.int32) - 30000, SHADES),
        (RAMP * 1000, SHADES),
        (RAMP, SHADES),
        (RAMP - 0.5, SHADES),
        (np.where(RAMP < 0.5, np.nan, RAMP * 1000), np.where(RAMP < 0.5, 0, (RAMP - 0.5) * 510)),
        (SHADES.astype(np.int32) // 2, SHADES // 2),
        (SHADES.astype(np.float32) / 2, SHADES / 2),
        (np.full((40, 80), 7000, np.uint16), np.zeros((40, 80))),
    ],
    ids=["uint16", "int32", "signed", "float", "to 1", "around 0", "nan", "8 bits", "float in 8 bits", "one value"],
)
def test_deep_images_are_scaled(values: np.ndarray, expected: np.ndarray, size: int | None, here: Path) -> None:
    seen = load(here, tiff(here, Image.fromarray(values)), image_size=size)[0]["image"].convert("RGB")
    assert np.abs(np.asarray(seen, dtype=float) - expected[..., None]).max() <= 1


def test_a_big_endian_png_of_16_bits(here: Path) -> None:
    Image.fromarray(np.rint(RAMP * 60000).astype(np.uint16)).save(here / "x.png")
    seen = load(here, [{"image": "x.png"}], image_size=20)[0]["image"]
    assert seen.size == (20, 10) and np.ptp(np.asarray(seen)) > 230


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16B"])
def test_every_mode_reaches_the_model_as_the_ramp_it_is(mode: str, size: int | None, here: Path) -> None:
    grey = Image.fromarray(SHADES.astype(np.uint8))
    if mode == "LAB":
        flat = Image.new("L", grey.size, 128)
        image = Image.merge("LAB", [grey, flat, flat])
    elif mode == "I;16B":
        image = Image.frombytes("I;16B", grey.size, np.rint(RAMP * 60000).astype(">u2").tobytes())
    else:
        image = (grey if mode in ("1", "LA") else grey.convert("RGB")).convert(mode if mode != "PA" else "P")
        image = image.convert(mode)
    seen = load(here, tiff(here, image), image_size=size)[0]["image"].convert("RGB")
    rows = np.asarray(seen, dtype=float).mean(axis=(1, 2))
    assert seen.size == ((80, 40) if size is None else (20, 10))
    assert rows[0] < 25 and rows[-1] > 230 and np.diff(rows).min() > (-40 if mode == "1" else -3)


@pytest.mark.parametrize("ending", ["tif", "gif", "webp", "png"])
def test_of_several_frames_the_first_is_shown_and_that_is_said(ending: str, here: Path) -> None:
    """Nor is its file left open, as `datasets` leaves that of several frames."""
    frames = [Image.new("RGB", (80, 40), (80 * n, 0, 200)) for n in range(3)]
    frames[0].save(here / f"x.{ending}", save_all=True, append_images=frames[1:])
    told: list[str] = []
    loaded = load(here, [{"image": "1.png"}, {"image": f"x.{ending}"}, {"image": f"x.{ending}"}], told)
    assert np.asarray(loaded[1]["image"].convert("RGB")).reshape(-1, 3).mean(axis=0)[0] < 5
    said = f"{here / 'rows.jsonl'}, row 1: the model sees only the first frame of the image {here / f'x.{ending}'}"
    assert f"{said} (2 such images)" in told


# Shapes


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((3000, 16), 256, (256, 2)),
        ((16, 3000), 256, (2, 256)),
        ((3000, 16), 255, (255, 2)),
        ((400, 301), 100, (100, 75)),
        ((1, 1), 256, (1, 1)),
    ],
)
def test_resizing_makes_no_image_thinner(
    size: tuple[int, int], asked: int, expected: tuple[int, int], here: Path, tiny: Callable[[str], Path]
) -> None:
    Image.new("RGB", size).save(here / "x.png")
    config = picture_config(tiny("qwen3_vl"), here, {"data": {"image_size": asked}}, gradient_accumulation_steps=1)
    (here / "pictures.jsonl").write_text(json.dumps({"prompt": "p", "image": "x.png"}) + "\n")
    loaded, _ = load_data(config, print)
    assert loaded[0]["image"].size == expected


@pytest.mark.parametrize("asked", [None, 256])
def test_an_image_that_the_processor_refuses_is_told_before_the_model(
    asked: int | None, here: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = picture_config(tiny("qwen3_vl"), here, {"data": {"image_size": asked}})
    Image.new("RGB", (4000, 3)).save(here / "2.png")
    monkeypatch.setattr("grpo_autotune.train.trainer.load_policy", None)
    with pytest.raises(DataError) as caught:
        build_trainer(config)
    assert f"pictures.jsonl, row 2: cannot read the image {here / '2.png'}: absolute aspect ratio" in str(caught.value)


@pytest.mark.slow
def test_images_of_all_kinds_are_trained_on(
    here: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels that reach the model are those of the file, wherever and however it is given."""
    config = picture_config(tiny("qwen3_vl"), here, {"data": {"image_size": 56}}, max_steps=2)
    plain = [asked({"type": "image", "image": f"{n}.png"}) for n in range(3)]
    plain.append(asked({"type": "image", "image": "deep.tif"}))
    for n in range(3):
        Image.effect_noise((84, 56), 60).convert("RGB").save(here / f"{n}.png")
    Image.fromarray(np.rint(RAMP * 60000).astype(np.uint16)).save(here / "deep.tif")
    in_text = json.loads(json.dumps(plain).replace('"0.png"', f'"{encoded(here, 0)}"'))
    kept: list[float] = []
    kind = type(load_processor(config.model, str(tiny("qwen3_vl"))).image_processor)
    process = kind._preprocess

    def seen(self: Any, images: list[Any], *args: Any, **kwargs: Any) -> Any:
        kept.extend(image.float().mean().item() for image in images)
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "_preprocess", seen)
    means = []
    for rows in (plain, in_text):
        (here / "pictures.jsonl").write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
        trainer = build_trainer(config, grpo_overrides={"output_dir": str(here / "run")})
        trainer.train()
        assert trainer.state.global_step == 2
        means.append([*kept])
        kept.clear()
    assert means[0] == means[1] and len(set(means[0])) == 4
    assert all(100 < mean < 160 for mean in means[0])  # half of all there is; the deep image would be white else
