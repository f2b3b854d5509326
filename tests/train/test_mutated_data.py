"""Mutated data sets: each is read whole, or refused in one short, printable line with an exit code of the table."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sources import profile_names, profiles_folder
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.errors import LONGEST, AutotuneError
from grpo_autotune.train.data.datasets import load_data
from grpo_autotune.train.data.templates import fit_prompts
from grpo_autotune.train.models.random_init import build_tokenizer
from tests.config.test_mutated import places


def picture(size: tuple[int, int], kind: str, mode: str = "RGB") -> bytes:
    out = BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


PNG = picture((30, 20), "PNG")
WRITTEN = base64.b64encode(PNG).decode()
FILES = {
    "a.png": PNG,
    "b.jpg": picture((20, 40), "JPEG", "CMYK"),
    "deep.tif": picture((9, 9), "TIFF", "I"),
    "thin.png": picture((999, 1), "PNG"),
    "cut.png": PNG[:-20],
    "cut.jpg": picture((64, 64), "JPEG")[:-40],
    "text.png": b"no picture",
    "none.png": b"",
}
SHAPES: list[Any] = [
    "What is 2 + 3?",
    "<image>What is it?",
    [{"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
    ],
    [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "b.jpg"}}, {"type": "text", "text": "?"}],
        }
    ],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
]
COLUMNS: list[dict[str, Any]] = [
    {},
    {},
    {"image": "a.png"},
    {"images": ["a.png", "b.jpg"]},
    {"image": {"path": "a.png"}},
]
SECTIONS = [
    parse_yaml((profiles_folder() / f"{name}.yaml").read_text("utf-8"), name)["data"] for name in profile_names()
]
KEYS = ["prompt", "image", "images", "answer", "role", "content", "type", "text", "path", "bytes", "tool_calls", "url"]

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | st.sampled_from([*FILES, *FILES.values(), WRITTEN, WRITTEN[:60], f"data:image/png;base64,{WRITTEN}", "data:,x"])
    | st.sampled_from(["x" * 9999, "\x1b[31m\x00", "\ud800", "", " ", ".", "no/x", "http://x/a.png", "file://a.png"])
    | st.sampled_from(["<image>", "<|im_start|>", "user", "tool", '[{"role": "user"}]', 10**400, -(10**30), "~x/\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), inner),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[dict[str, Any], str, bytes | list[Any]]:
    """The keys of a data section, a file's name, and what it holds."""
    section = draw(st.sampled_from(SECTIONS))
    ours = {key: section[key] for key in ("image_size", "columns", "system_prompt") if key in section}
    ours = draw(st.sampled_from([{}, {}, ours]))
    theirs = ours.get("columns", {})
    row = {"prompt": draw(st.sampled_from(SHAPES)), "answer": "5", **draw(st.sampled_from(COLUMNS))}
    rows: list[Any] = [copy.deepcopy({theirs.get(key, key): value for key, value in row.items()}) for _ in range(3)]
    for _ in range(draw(st.integers(1, 3))):
        held, key = draw(st.sampled_from(places(rows) or [(rows, 0)]))
        change = draw(st.sampled_from(["value", "remove", "rename", "twice"]))
        if isinstance(held, list):
            held[key:] = [held[key]] * 2 if change == "twice" else [draw(odd), *held[key + 1 :]]
        elif change == "value":
            held[key] = draw(odd)
        else:
            value = held[key] if change == "twice" else held.pop(key)
            held |= {} if change == "remove" else {draw(st.sampled_from(KEYS) | st.text(max_size=9)): value}
    ending = draw(st.sampled_from(["jsonl", "jsonl", "json", "parquet"]))
    if ending == "parquet":
        return ours, "rows.parquet", rows
    texts = [json.dumps(row, default=str, ensure_ascii=draw(st.booleans())) for row in rows]
    text = "\n".join(texts) if ending == "jsonl" else f"[{', '.join(texts)}]"
    content = text.encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-8-sig", "utf-16"])), "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    return ours, f"rows.{ending}", content


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=mutated())
def test_a_mutated_data_set_is_read_whole_or_refused_in_one_line(
    case: tuple[dict[str, Any], str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (section, name, content), folder, said = case, tmp_path / "data", []
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, held in FILES.items():
        (folder / file).write_bytes(held)
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        try:
            datasets.Dataset.from_list(content).to_parquet(folder / name)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):  # Arrow cannot hold it
            reject()
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "exact_match"}], "data": {**section}}
    values["data"]["path"] = str(folder / name)
    values["grpo"] = {"per_device_train_batch_size": 2, "num_generations": 2}
    try:
        train, _ = load_data(RunConfig.from_dict(values), said.append)
        tokenizer = build_tokenizer(["What is it?"])
        fit_prompts(train, tokenizer, {}, str(folder / name), said.append)[:]
    except AutotuneError as error:
        said.append(str(error))
        assert error.exit_code in (1, 2, 3), error
    assert all(len(line) <= LONGEST and line.isprintable() for line in said), said
