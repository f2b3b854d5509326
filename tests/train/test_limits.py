"""Long prompts, areas of images, and templates: each against what the trainer would have made of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trl import GRPOTrainer

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.errors import AutotuneError, ConfigError, DataError
from grpo_autotune.seams.stored_images import Limits
from grpo_autotune.train.data import lengths
from grpo_autotune.train.data.datasets import load_data
from grpo_autotune.train.data.templates import fit_prompts
from grpo_autotune.train.models.load import load_processor
from grpo_autotune.train.models.random_init import CHAT_TEMPLATE, build_tokenizer
from grpo_autotune.train.trainer import build_trainer
from grpo_autotune.trained.prompts import inputs_of, prompt_of
from tests.support.training import picture_config, text_config

Tiny = Callable[[str], Path]
ROWS = [{"prompt": "Which digit is shown? " * n, "answer": n} for n in (1, 9, 2, 5)]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def load(path: Path, **data: Any) -> datasets.Dataset:
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "format"}], "data": {"path": str(path), **data}}
    grpo = {"per_device_train_batch_size": 2, "num_generations": 2}
    return load_data(RunConfig.from_dict({**values, "grpo": grpo}), lambda line: None)[0]


def lines(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"


def problem(kind: type[AutotuneError], path: Path, **data: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **data)
    return str(caught.value)


# Long prompts


def fit(rows: datasets.Dataset, processor: Any, **data: Any) -> tuple[datasets.Dataset, list[str]]:
    said: list[str] = []
    section = DataSection.model_validate({"path": "d", **data})
    return fit_prompts(rows, processor, {}, "rows.jsonl", said.append, section), said


def token_counts(rows: datasets.Dataset, processor: Any) -> list[int]:
    return [inputs_of(prompt_of(row, processor), processor, {})["input_ids"].shape[1] for row in rows]


def text_tokenizer() -> Any:
    tokenizer = build_tokenizer(["Which digit is shown?"])
    tokenizer.chat_template, tokenizer.truncation_side = CHAT_TEMPLATE, "left"
    return tokenizer


@pytest.mark.parametrize("how", ["messages", "text"])
def test_longer_prompts_are_left_out(how: str, tmp_path: Path) -> None:
    rows, tokenizer = load(lines(tmp_path), prompt_format=how), text_tokenizer()
    counts = token_counts(rows, tokenizer)
    assert fit(rows, tokenizer, max_prompt_tokens=max(counts)) == (rows, [])
    kept, (line,) = fit(rows, tokenizer, max_prompt_tokens=counts[2])
    assert kept["answer"][:] == [1, 2] and token_counts(kept, tokenizer) == [counts[0], counts[2]]
    told = f"have more than {counts[2]} tokens (data.max_prompt_tokens), up to {counts[1]} (row 1): left out"
    assert line == f"rows.jsonl: 2 of 4 prompts {told}"
    with pytest.raises(DataError, match=r"rows\.jsonl: no prompt is short enough"):
        fit(rows, tokenizer, max_prompt_tokens=1)


def test_a_longer_prompt_is_an_error(tmp_path: Path) -> None:
    rows, tokenizer = load(lines(tmp_path)), text_tokenizer()
    counts = token_counts(rows, tokenizer)
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: its prompt has {counts[1]} tokens, .*\(2 such rows\)"):
        fit(rows, tokenizer, max_prompt_tokens=counts[2], prompt_overflow="error")


@pytest.mark.parametrize("how", ["messages", "text"])
def test_a_longer_prompt_keeps_its_last_tokens(how: str, tmp_path: Path) -> None:
    rows, tokenizer = load(lines(tmp_path), prompt_format=how), text_tokenizer()
    whole = [inputs_of(row["prompt"], tokenizer, {})["input_ids"][0].tolist() for row in rows]
    kept, (line,) = fit(rows, tokenizer, max_prompt_tokens=12, prompt_overflow="left")
    again, _ = fit(rows, tokenizer, max_prompt_tokens=12, prompt_overflow="left")
    assert kept is rows and again is rows and line.endswith("cut from the left")
    assert [inputs_of(row["prompt"], tokenizer, {})["input_ids"][0].tolist() for row in rows] == [
        ids[-12:] for ids in whole
    ]


def pictures(folder: Path, *sizes: tuple[int, int]) -> list[str]:
    paths = [folder / f"{width}x{height}.png" for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, (9, 99, 200)).save(path)
    return [path.name for path in paths]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_images_count_as_the_processor_counts_them(
    kind: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, wide, large = pictures(tmp_path, (56, 56), (300, 80), (400, 500))
    asked = [("Which?", []), ("<image> and <image>?", [small, wide]), ("Which?", [large]), ("a <image>", [small])]
    rows = load(lines(tmp_path, [{"prompt": text, "images": images} for text, images in asked]))
    config = text_config(tiny(kind), tmp_path)
    processor = load_processor(config.model, str(config.model.name_or_path))
    counts = [lengths._processed(row, processor, {}) for row in rows]
    sizes = lengths.image_sizes(rows)
    assert sizes == [[], [(56, 56), (80, 300)], [(500, 400)], [(56, 56)]]
    assert lengths.prompt_tokens(rows, processor, {}, sizes) == counts
    kept, (line,) = fit(rows, processor, max_prompt_tokens=max(counts) - 1)
    assert len(kept) == 3 and "row 2" in line
    with pytest.raises(DataError, match=r"more than data\.max_prompt_tokens .*, and one with an image is not cut"):
        fit(rows, processor, max_prompt_tokens=max(counts) - 1, prompt_overflow="left")

    monkeypatch.setattr(
        type(processor), "_get_num_multimodal_tokens", lambda self, image_sizes: {"num_image_tokens": [1] * 3}
    )
    assert lengths.prompt_tokens(rows, processor, {}, sizes) == counts


def test_the_trainers_own_tokens_are_cut_and_its_rows_filtered(tiny: Tiny, tmp_path: Path) -> None:
    changes = {"data": {"max_prompt_tokens": 9, "prompt_overflow": "left", "eval_split": "train"}}
    trainer = build_trainer(text_config(tiny("qwen3"), tmp_path, changes))
    ids = GRPOTrainer._tokenize_prompts(trainer, trainer.train_dataset["prompt"][:])[0]
    assert {len(one) for one in ids} == {9} and len(trainer.eval_dataset) == 8
    trainer.processing_class.save_pretrained(tmp_path / "saved")  # where others would be cut, too
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] is None
    changes["data"] = {"max_prompt_tokens": 9}
    with pytest.raises(DataError, match="no prompt is short enough"):
        build_trainer(text_config(tiny("qwen3"), tmp_path, changes))


# Areas


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), st.integers(200, 300_000), st.integers(1, 200))
def test_an_area_is_kept_with_the_aspect(size: tuple[int, int], most: int, least: int) -> None:
    width, height = fitted = Limits(most=most, least=least).fitted(size)
    area = size[0] * size[1]
    if least <= area <= most:
        assert fitted == size
    if max(size) <= 100 * min(size):  # else the shorter side is rounded up
        assert width * height <= most if area > most else width * height >= least
        assert abs(width * size[1] - height * size[0]) <= max(size)


def test_images_are_shrunk_and_enlarged_to_an_area(tmp_path: Path) -> None:
    names = pictures(tmp_path, (40, 20), (100, 400), (64, 64))
    path = lines(tmp_path, [{"prompt": "Which?", "image": name} for name in names])
    rows = load(path, max_pixels=10_000, min_pixels=3_200)
    assert [image.size for image in rows["image"]] == [(80, 40), (50, 200), (64, 64)]
    rows = load(path, image_size=40, min_pixels=3_200)
    assert [image.size for image in rows["image"]] == [(80, 40), (29, 115), (57, 57)]
    told = "data.min_pixels: 9 is more than max_pixels 5"
    assert told in problem(ConfigError, path, max_pixels=5, min_pixels=9)
    mix = {"a": {"path": str(path), "min_pixels": 9}}
    assert told.replace("data", "data.mix.a") in problem(ConfigError, path, mix=mix, max_pixels=5)


# verl's parquet


def test_verls_parquet(tmp_path: Path) -> None:
    image = BytesIO()
    Image.new("RGB", (30, 20), (9, 9, 9)).save(image, "PNG")
    row = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>Find x."}],
        "images": [{"bytes": image.getvalue(), "path": None}],
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
    }
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    columns = {"ground_truth": "reward_model.ground_truth"}
    parts = {name: {"path": str(tmp_path / f"{name}.parquet"), "columns": columns} for name in ("a", "b")}
    rows = load(tmp_path, mix=parts)
    assert sorted(rows["dataset"]) == ["a", "a", "b"] and rows["ground_truth"][:] == ["3"] * 3
    assert rows[0]["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x."}]}]
    assert rows[0]["images"][0].size == (30, 20) and rows[0]["extra_info"] == {"index": 0, "split": "train"}


# Templates


def test_a_jinja_template_is_text_or_a_file(tmp_path: Path) -> None:
    template = r"{{ content | trim }} Put it in \boxed{}.{% if answer > 5 %} Think.{% endif %}"
    (tmp_path / "math.jinja").write_text(template)
    path, columns = lines(tmp_path), {"content": "prompt"}
    for given_as in (template, str(tmp_path / "math.jinja")):
        prompts = load(path, columns=columns, prompt_template=given_as)["prompt"]
        assert prompts[0][0]["content"] == r"Which digit is shown? Put it in \boxed{}."
        assert prompts[1][0]["content"].endswith(r"\boxed{}. Think.")
    asked = "\\text{{%}} {prompt}"
    assert load(path, prompt_template=asked)["prompt"][0][0]["content"] == "\\text{%} Which digit is shown? "
    (tmp_path / "set.j2").write_text("{answer} in a set")
    assert load(path, prompt_template=str(tmp_path / "set.j2"))["prompt"][0][0]["content"] == "{answer} in a set"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ content }", "data.prompt_template: no Jinja template, line 1: "),
        ("{{ prompts }}", "data.prompt_template: the data has no column prompts"),
        ("{{ prompt.__class__.__mro__ }}", "data.prompt_template: does not fit row 0: access to attribute '__class__'"),
        ("{{ answer.gold.value }}", "data.prompt_template: does not fit row 0: "),
        ("{{ hint }}", "data.prompt_template: does not fit row 0: a column that it names is empty there"),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "data.prompt_template: does not fit row 0: ",
        ),
        ("gone.jinja", "data.prompt_template: cannot read gone.jinja: No such file"),
    ],
)
def test_a_jinja_template_that_does_not_fit(template: str, told: str, tmp_path: Path) -> None:
    rows = [{**row, "hint": None} for row in ROWS]
    assert problem(ConfigError, lines(tmp_path, rows), prompt_template=template).startswith(told)


def test_a_chat_template_reaches_what_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    template = "{% for turn in messages %}[{{ turn['role'] }}]{% endfor %}"
    for kind, config_of in (("qwen3", text_config), ("qwen3_vl", picture_config)):
        (tmp_path / "own.jinja").write_text(template)
        config = config_of(tiny(kind), tmp_path, {"model": {"chat_template": str(tmp_path / "own.jinja")}})
        (tmp_path / "own.jinja").unlink()
        processor = load_processor(config.model, str(config.model.name_or_path))
        processor.save_pretrained(tmp_path / kind)
        plain = load_processor(text_config(tiny(kind), tmp_path).model, str(tmp_path / kind))
        assert plain.apply_chat_template([{"role": "user", "content": "Which?"}], tokenize=False) == "[user]"
