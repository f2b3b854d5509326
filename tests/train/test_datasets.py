"""Data of every kind becomes rows as TRL wants them, and a row that cannot be used is named."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from grpo_autotune import registry
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError, ConfigError, DataError
from grpo_autotune.seams import stored_images
from grpo_autotune.train.data import pictures
from grpo_autotune.train.data.datasets import load_data
from grpo_autotune.train.data.sources import read_rows

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/test.jsonl"
GRPO = {"per_device_train_batch_size": 4, "num_generations": 4}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def load(**data: Any) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "exact_match"}], "grpo": GRPO, "data": data}
    return load_data(RunConfig.from_dict(values), lambda line: None)


def problem(kind: type[AutotuneError], **data: Any) -> str:
    with pytest.raises(kind) as caught:
        load(**data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(size: tuple[int, int], kind: str = "PNG", shade: int = 90, mode: str = "RGB") -> bytes:
    out = BytesIO()
    Image.linear_gradient("L").resize(size).point(lambda value: (value + shade) % 256).convert(mode).save(out, kind)
    return out.getvalue()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


QUESTIONS = [{"question": f"What is {n} + 1?", "gold": n + 1} for n in range(10)]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_lines(tmp_path / "rows.jsonl", QUESTIONS)


def test_columns_are_mapped_and_others_kept(lines: str) -> None:
    train, held_out = load(path=lines, columns={"prompt": "question"})
    assert held_out is None and set(train.column_names) == {"prompt", "gold"}
    assert train[3] == {"prompt": user("What is 3 + 1?"), "gold": 4}


def test_a_column_may_be_copied_and_two_may_be_swapped(lines: str) -> None:
    train, _ = load(path=lines, columns={"prompt": "question", "text": "question", "question": "gold"})
    assert train[1] == {"prompt": user("What is 1 + 1?"), "text": "What is 1 + 1?", "question": 2}


def test_template_and_system_prompt(lines: str) -> None:
    train, _ = load(
        path=lines,
        columns={"answer": "gold"},
        prompt_template="{question} ({answer:02d} or {gold}) {{}}",
        system_prompt="S",
    )
    assert train[0]["prompt"] == [{"role": "system", "content": "S"}, *user("What is 0 + 1? (01 or 1) {}")]
    assert train[0]["answer"] == 1


def test_a_template_with_braces_in_the_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "{x} {0}"}])
    assert load(path=path, prompt_template="<{q}>")[0][0]["prompt"] == user("<{x} {0}>")


def test_limits_slices_and_held_out_rows(lines: str, tmp_path: Path) -> None:
    columns = {"prompt": "question"}
    train, held_out = load(
        path=lines, split="train[:60%]", eval_split="train[60%:]", max_samples=5, max_eval_samples=3, columns=columns
    )
    assert held_out is not None
    assert (train["gold"][:], held_out["gold"][:]) == ([1, 2, 3, 4, 5], [7, 8, 9])
    other = write_lines(tmp_path / "other.jsonl", QUESTIONS[:2])
    assert len(load(path=lines, eval_path=other, columns=columns)[1] or []) == 2


def test_several_held_out_sets(lines: str, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", QUESTIONS[:2])
    sets = {"own": {"split": "train[60%:]"}, "other": {"path": other}}
    train, held_out = load(path=lines, eval=sets, max_eval_samples=3, columns={"prompt": "question"})
    assert len(train) == 10 and [(name, rows["gold"][:]) for name, rows in held_out.items()] == [
        ("own", [7, 8, 9]),
        ("other", [1, 2]),
    ]
    text = problem(ConfigError, path=lines, eval={"far": {"split": "test"}}, columns={"prompt": "question"})
    assert text.startswith("data.eval.far.split: ") and "has no split test. Splits there: train." in text


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    rows = datasets.Dataset.from_list(QUESTIONS)
    write: dict[str, Callable[[Path], Any]] = {
        ".json": lambda p: p.write_text(json.dumps(QUESTIONS)),
        ".jsonl": rows.to_json,
        ".csv": rows.to_csv,
        ".parquet": rows.to_parquet,
    }
    write[ending](path)
    train, _ = load(path=str(path), columns={"prompt": "question"})
    assert len(train) == 10 and train[9] == {"prompt": user("What is 9 + 1?"), "gold": 10}


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_byte_order_mark_and_other_ends_of_lines_are_no_text(ending: str, tmp_path: Path) -> None:
    lines = {".jsonl": '{"q": "caf\u00e9", "a": 1}', ".csv": "q,a\r\ncaf\u00e9,1"}[ending]
    (tmp_path / f"rows{ending}").write_bytes(f"{lines}\r\n".encode("utf-8-sig"))
    train, _ = load(path=str(tmp_path / f"rows{ending}"), columns={"prompt": "q"})
    assert train[:] == {"prompt": [user("caf\u00e9")], "a": [1]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n' * 3 + '{"a": "caf\u00e9"}\n'.encode("latin-1"),
            "line 4 is not UTF-8. Convert the file",
        ),
        ("a.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), "line 2 is not UTF-8. Convert the file"),
        ("a.json", '[\n{"a": "\u20ac"}]'.encode("cp1252"), "line 2 is not UTF-8. Convert the file"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "line 1 is UTF-16. Convert the file to UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-be"), "line 1 is UTF-16. Convert the file to UTF-8"),
        ("a.jsonl", '{"a": "\u4e2d\u6587"}\n'.encode("utf-16"), "line 1 is UTF-16. Convert the file to UTF-8"),
        ("a.jsonl", b'{"a": 1}\nnull\n', "line 2 is null"),
        ("a.json", b'[null, {"a": 1}]', "line 1 is null"),
        ("a.json", b'null\n{"a": 1}\n', "line 1 is null"),
        ("a.json", b'[\n{"a": [\nnull\n]}]', ""),
        ("a.csv", "prompt\ncaf\u00e9\n".encode("utf-8-sig"), ""),
        ("a.jsonl", '{"a": "caf\u00e9"}\r\n'.encode(), ""),
        ("a.jsonl", gzip.compress(b'{"a": 1}\n' * 9, mtime=0), ""),
    ],
)
def test_text_in_another_encoding(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if not expected:
        assert len(read_rows(str(tmp_path / name), None)) > 0
        return
    assert problem(DataError, path=str(tmp_path / name)).startswith(f"{tmp_path / name}: {expected}")


def test_saved_folders_with_and_without_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(QUESTIONS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([4, 5])}).save_to_disk(tmp_path / "two")
    columns = {"prompt": "question"}
    assert load(path=str(tmp_path / "one"), split="train[8:]", columns=columns)[0]["gold"][:] == [9, 10]
    train, held_out = load(path=str(tmp_path / "two"), eval_split="test", columns=columns)
    assert held_out is not None and (len(train), held_out["gold"][:]) == (10, [5, 6])
    text = problem(ConfigError, path=str(tmp_path / "two"), split="tset", columns=columns)
    assert "has no split tset. Splits there: train, test." in text


def test_conversations_are_kept_as_they_are(tmp_path: Path) -> None:
    talk = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": talk}])
    assert load(path=path)[0][0]["prompt"] == talk
    assert load(path=path, system_prompt="S")[0][0]["prompt"] == [{"role": "system", "content": "S"}, *talk]
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": [{"role": "system", "content": "x"}, *talk]}])
    assert "have a system message already" in problem(ConfigError, path=own, system_prompt="S")


def test_a_registered_function_gets_split_and_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", {kind: dict(rows) for kind, rows in registry._TABLE.items()})

    @registry.register("dataset", "counting")
    def counting(split: str, start: int = 0) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": user(f"{split} {start + n}"), "answer": n} for n in range(3)])

    @registry.register("dataset", "wrong")
    def wrong(split: str) -> list[int]:
        return [1]

    train, held_out = load(path="counting", eval_split="test", params={"start": 5})
    assert held_out is not None
    assert (train[0]["prompt"], held_out[2]["prompt"]) == (user("train 5"), user("test 7"))
    assert "wrong returned list, not a datasets.Dataset" in problem(ConfigError, path="wrong")
    assert "Nearest: counting." in problem(ConfigError, path="countin")


@pytest.mark.skipif(not GSM8K.is_file(), reason="the real GSM8K text is not here")
def test_real_gsm8k() -> None:
    train, _ = load(path=str(GSM8K), columns={"prompt": "question"}, max_samples=50)
    assert train[0]["prompt"][0]["content"].startswith("Janet") and train[0]["answer"].endswith("#### 18")


# Mistakes


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "the data has no column prompt. Map one with data.columns.prompt, or write data.prompt_template."),
        ({"columns": {"prompt": "qestion"}}, "no column qestion. Nearest: question. Columns: question, gold."),
        ({"prompt_template": "{qestion}"}, "data.prompt_template: the data has no column qestion. Nearest: question."),
        ({"prompt_template": "{question"}, "data.prompt_template: not a format string"),
        ({"prompt_template": "{question.x}"}, "{question.x} is not the name of a column"),
        ({"prompt_template": "{}"}, "{} is not the name of a column"),
        ({"columns": {"prompt": "question"}, "split": "test"}, "has no split test. Splits there: train."),
        (
            {"columns": {"prompt": "question", "completions": "gold"}},
            "column completions has a name that TRL uses itself",
        ),
        ({"columns": {"prompt": "question"}, "params": {"a": 1}}, "data.params: params are for a registered"),
        ({"columns": {"prompt": "question"}, "name": "main"}, "data.name: only a data set on the hub has a name, and "),
        (
            {"columns": {"prompt": "question"}, "revision": "v2"},
            "data.revision: only a data set on the hub has a revision",
        ),
        ({"prompt_template": "{question:d}"}, "data.prompt_template: does not fit row 0"),
    ],
)
def test_a_wrong_column_or_split(lines: str, data: dict[str, Any], expected: str) -> None:
    assert expected in problem(ConfigError, path=lines, **data)


def test_rows_that_are_not_there(tmp_path: Path, lines: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert f"{empty}: the file is empty" in problem(DataError, path=str(empty))
    assert "there is no file or folder" in problem(ConfigError, path=str(tmp_path / "absent.jsonl"))
    assert "there is no file or folder rows.csv" in problem(ConfigError, path="rows.csv")
    (tmp_path / "rows.txt").write_text("x")
    assert "Accepted: .json, .jsonl, .csv, .parquet." in problem(ConfigError, path=str(tmp_path / "rows.txt"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": 1}\n{"a"\n')
    assert f"{broken}: cannot be read" in problem(DataError, path=str(broken))
    headed = tmp_path / "headed.csv"
    headed.write_text("prompt,answer\n")
    assert "the data set is empty" in problem(DataError, path=str(headed))
    unlabelled = write_lines(tmp_path / "null.jsonl", [{"prompt": "a"}, {"prompt": None}])
    assert "row 1: the prompt is None" in problem(DataError, path=unlabelled)
    assert "row 0: the prompt is 1" in problem(DataError, path=lines, columns={"prompt": "gold"})


def test_too_few_rows_for_one_generation(lines: str) -> None:
    grpo = {"per_device_train_batch_size": 24, "num_generations": 2}
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "format"}], "grpo": grpo}
    config = RunConfig.from_dict(values | {"data": {"path": lines, "columns": {"prompt": "question"}}})
    with pytest.raises(ConfigError, match="has 10 rows, and a generation takes 12 different prompts"):
        load_data(config, lambda line: None)


# Images


@pytest.fixture
def gallery(tmp_path: Path) -> str:
    """Six rows over three image files: 400x200 PNG, 100x300 JPEG, 40x40 PNG."""
    (tmp_path / "img").mkdir()
    contents = [picture((400, 200)), picture((100, 300), "JPEG"), picture((40, 40))]
    files = [f"img/{n}.{'jpg' if n == 1 else 'png'}" for n in range(3)]
    for file, content in zip(files, contents, strict=True):
        (tmp_path / file).write_bytes(content)
    return write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "photo": files[n % 3]} for n in range(6)])


def test_images_are_found_beside_the_data_file(gallery: str) -> None:
    train, _ = load(path=gallery, columns={"image": "photo"})
    assert [row["image"].size for row in train][:3] == [(400, 200), (100, 300), (40, 40)]
    assert isinstance(train.features["image"], datasets.Image)


def test_each_distinct_image_is_shrunk_once_and_none_enlarged(
    gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[tuple[int, int]] = []
    real = Image.Image.resize

    def counted(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        worked.append(size)
        return real(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counted)
    for _ in range(2):
        train, _ = load(path=gallery, columns={"image": "photo"}, image_size=150)
        assert [row["image"].size for row in train] == [(150, 75), (50, 150), (40, 40)] * 2
        assert sorted(worked) == [(50, 150), (150, 75)]
    assert [row["image"].format for row in train][:3] == ["PNG", "JPEG", "PNG"]
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 3
    with Image.open(tmp_path / "img/0.png") as original:
        expected = real(original, (150, 75), Image.Resampling.LANCZOS)
    assert train[0]["image"].tobytes() == expected.tobytes()


def test_a_full_disk_leaves_no_part_of_an_image(gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        load(path=gallery, columns={"image": "photo"}, image_size=150)
    assert list((tmp_path / "cache" / "images").iterdir()) == []


def test_images_in_the_rows_themselves_lists_and_gaps(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {
            "prompt": ["a", "b", "c"],
            "images": [
                [{"bytes": picture((90, 30)), "path": None}],
                [],
                [{"bytes": picture((10, 60)), "path": None}] * 2,
            ],
        }
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    train, _ = load(path=str(tmp_path / "rows.parquet"), image_size=30)
    assert [[image.size for image in row["images"]] for row in train] == [[(30, 10)], [], [(5, 30), (5, 30)]]
    single = rows.remove_columns("images").add_column(
        "image", [{"bytes": picture((90, 30)), "path": None}, None, None], feature=datasets.Image()
    )
    single.save_to_disk(tmp_path / "single")
    train, _ = load(path=str(tmp_path / "single"), image_size=45)
    assert train[0]["image"].size == (45, 15) and train[1]["image"] is None
    train, _ = load(path=str(tmp_path / "single"))
    assert train[0]["image"].size == (90, 30)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_colour_mode_can_be_shrunk(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (80, 40)).save(file)
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "image": file.name}])
    assert load(path=path, image_size=20)[0][0]["image"].size == (20, 10)


def test_a_turned_photo_stays_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be shown a quarter turn clockwise
    Image.new("RGB", (80, 40)).save(tmp_path / "x.jpg", exif=turned)
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "image": "x.jpg"}])
    assert load(path=path)[0][0]["image"].size == (40, 80)
    assert load(path=path, image_size=20)[0][0]["image"].size == (10, 20)


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", picture((64, 64))[:-40]),
        ("1.jpg", picture((64, 64), "JPEG")[:-40]),
        ("1.bmp", picture((64, 64), "BMP")[:-400]),
        ("1.png", b"<html>not found</html>"),
        ("1.png", b""),
        ("absent.png", None),
    ],
)
def test_an_unreadable_image_is_named_with_its_row(
    name: str, content: bytes | None, size: int | None, tmp_path: Path
) -> None:
    (tmp_path / "0.png").write_bytes(picture((40, 40)))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = write_lines(
        tmp_path / "rows.jsonl", [{"prompt": "p", "image": "0.png"}] * 3 + [{"prompt": "p", "image": name}]
    )
    text = problem(DataError, path=path, image_size=size)
    assert text.startswith(f"{path}, row 3: cannot read the image") and name in text
    assert "BytesIO" not in text


def test_an_image_size_without_images_is_told(lines: str) -> None:
    told: list[str] = []
    data = {"path": lines, "columns": {"prompt": "question"}, "image_size": 64}
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "format"}], "grpo": GRPO, "data": data}
    load_data(RunConfig.from_dict(values), told.append)
    assert f"data.image_size is 64, and {lines} has no images" in told


def test_a_registered_data_set_has_no_revision() -> None:
    assert "data.revision: only a data set on the hub has a revision, and digits is a registered function" in problem(
        ConfigError, path="digits", revision="v1"
    )


def test_a_whole_jpeg_with_something_behind_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(picture((64, 64), "JPEG") + b"\0" * 200)
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "image": "x.jpg"}])
    assert load(path=path)[0][0]["image"].size == (64, 64)


def test_a_column_that_holds_no_images(lines: str) -> None:
    text = problem(DataError, path=lines, columns={"prompt": "question", "image": "gold"})
    assert "the column image holds Value('int64'), not images" in text


def test_image_folders_by_class_and_by_metadata(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / "classes" / kind).mkdir(parents=True)
        (tmp_path / "classes" / kind / "1.png").write_bytes(picture((50, 50)))
    train, _ = load(path=str(tmp_path / "classes"), prompt_template="Which animal?", columns={"answer": "label"})
    assert sorted(train["answer"][:]) == ["cat", "dog"] and train[0]["image"].size == (50, 50)
    folder = tmp_path / "listed"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture((60, 30)))
    (folder / "metadata.csv").write_text("file_name,question,answer\na.png,What?,7\n")
    train, _ = load(path=str(folder), columns={"prompt": "question"}, image_size=30)
    assert (train[0]["prompt"], train[0]["answer"], train[0]["image"].size) == (user("What?"), 7, (30, 15))


def test_work_is_told_while_it_goes_on(gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_images, "BATCH_ROWS", 2)
    monkeypatch.setattr(pictures, "TELL_EVERY", 2)
    said: list[str] = []
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "format"}], "grpo": GRPO}
    data = {"path": gallery, "columns": {"image": "photo"}, "image_size": 50}
    train, _ = load_data(RunConfig.from_dict(values | {"data": data}), said.append)
    assert said[0] == f"reading {gallery} (train)" and "resized 4 of 6 rows' images" in said
    assert [row["image"].size for row in train] == [(50, 25), (17, 50), (40, 40)] * 2
