"""Prompts of every shape become what was written, and pictures stand where the text has their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError, ConfigError, DataError
from grpo_autotune.train.data.datasets import load_data
from grpo_autotune.train.data.templates import fit_prompts
from grpo_autotune.train.models.load import load_processor
from grpo_autotune.train.models.random_init import CHAT_TEMPLATE, build_tokenizer
from grpo_autotune.train.trainer import build_trainer
from grpo_autotune.trained.prompts import inputs_of, prompt_of
from tests.support.training import picture_config, text_config

Turn = dict[str, Any]

SYSTEM: Turn = {"role": "system", "content": "You read digits."}
TEXT: Turn = {"type": "text", "text": "Which digit?"}
PICTURED: Turn = {"role": "user", "content": [{"type": "image"}, TEXT]}
ASKED: Turn = {"role": "user", "content": "Which digit?"}
ANSWERED: Turn = {"role": "assistant", "content": "7"}
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] + '\\n' }}{% endfor %}"
)
"""A template that refuses roles, as Gemma's does, and adds texts, as many do."""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def load(path: Path, **data: Any) -> datasets.Dataset:
    grpo = {"per_device_train_batch_size": 2, "num_generations": 2}
    values = {"model": {"name_or_path": "m"}, "rewards": [{"name": "format"}], "grpo": grpo}
    return load_data(RunConfig.from_dict(values | {"data": {"path": str(path), **data}}), lambda line: None)[0]


def lines(folder: Path, prompts: list[Any], pictures: int | None = None) -> Path:
    """A JSONL file of these prompts, each row with so many pictures."""
    rows: list[Turn] = [{"prompt": prompt, "answer": str(row)} for row, prompt in enumerate(prompts)]
    if pictures is not None:
        Image.new("RGB", (28, 28)).save(folder / "a.png")
        rows = [row | {"images": ["a.png"] * pictures} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"


def problem(kind: type[AutotuneError], path: Path, **data: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **data)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def in_parts(*texts: str | None) -> Turn:
    """A user turn of these texts, None being a picture."""
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
    return {"role": "user", "content": parts}


# Shapes


@pytest.mark.parametrize(
    "prompts",
    [
        [[SYSTEM, PICTURED]] * 2,
        ["Which digit?", [PICTURED]],
        [[PICTURED], [SYSTEM, PICTURED]],
        [[{"role": "system", "content": [{"type": "text", "text": "You read digits."}]}, PICTURED], [ASKED]],
        [[ASKED, {"role": "assistant", "content": "A seven."}, PICTURED], "Which digit?"],
    ],
)
def test_any_mixture_trains_on_what_was_written(prompts: list[Any], tmp_path: Path) -> None:
    """Each row as TRL would hand it to the template, had it come alone."""
    rows = load(lines(tmp_path, prompts, 1))
    for row, prompt in zip(rows, prompts, strict=True):
        written = [ASKED] if isinstance(prompt, str) else prompt
        pictured = any(turn["content"][0] == {"type": "image"} for turn in written)
        if pictured:  # TRL alone would put a picture into the first text as well
            written = [
                turn
                if isinstance(turn["content"], list)
                else {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                for turn in written
            ]
        assert prepare_multimodal_messages(row["prompt"], ["p"]) == prepare_multimodal_messages(written, ["p"])


def test_keys_that_arrow_fills_in_are_left_out(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 0.1234567890123, "near": 1e300}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    prompt = [ASKED, calling, {"role": "tool", "name": "look", "content": "7"}, ASKED]
    filled = [{key: turn.get(key) for key in ("role", "content", "tool_calls", "name")} for turn in prompt]
    rows = datasets.Dataset.from_dict({"prompt": [filled, [{**ASKED, "tool_calls": None, "name": None}]]})
    assert rows[1]["prompt"][0]["tool_calls"] is None
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet")["prompt"][:] == [prompt, [ASKED]]
    parts = [[{"role": "user", "content": [{"type": "image", "text": None}, TEXT]}]] * 2
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    datasets.Dataset.from_dict({"prompt": parts, "image": ["a.png"] * 2}).to_parquet(tmp_path / "parts.parquet")
    assert load(tmp_path / "parts.parquet")["prompt"][1] == [PICTURED]


@pytest.mark.parametrize("value", [10**25, float("nan"), "x\ud800"])
def test_a_value_that_the_store_of_messages_would_change_is_refused(value: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": value}}}
    prompts = [json.dumps([ASKED]), json.dumps([ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])]
    datasets.Dataset.from_dict({"prompt": prompts}).to_parquet(tmp_path / "rows.parquet")
    line = problem(DataError, tmp_path / "rows.parquet")
    assert "row 1: a number or another value of the prompt cannot be kept as it is" in line


def test_messages_in_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    datasets.Dataset.from_dict({"prompt": [json.dumps([SYSTEM, ASKED]), "Which digit?"]}).to_csv(path)
    assert load(path)["prompt"][:] == [[SYSTEM, ASKED], [ASKED]]
    datasets.Dataset.from_dict({"prompt": [str([ASKED])]}).to_csv(path)
    assert "or messages (in a table of text, as JSON)." in problem(DataError, path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], "row 1: the prompt is []"),
        (None, "row 1: the prompt is None"),
        (" ", "row 1: the prompt is ' '"),
        ([{"role": "user", "content": None}], "row 1: a turn of the prompt is {'role': 'user'}"),
        ([ASKED, {"role": "assistant", "content": None}], "row 1: a turn of the prompt is {'role': 'assistant'}"),
        ([{"role": "user", "content": []}], "row 1: a turn of the prompt is {"),
        ([{"content": "a"}], "row 1: a turn of the prompt is {'content': 'a'}"),
        ([{"from": "human", "text": "a"}], "row 1: a turn of the prompt is {'from': "),
        ([{"role": "user", "content": [{"type": "text"}]}], "row 1: a turn of the prompt is {"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "row 1: a turn of the prompt is {"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "row 1: a turn of the prompt is {"),
        ([{"role": "user", "content": ["a"]}], "row 1: a turn of the prompt is {"),
    ],
)
def test_a_shape_that_cannot_be_used(prompt: Any, expected: str, tmp_path: Path) -> None:
    assert expected in problem(DataError, lines(tmp_path, [[ASKED], prompt]))


def test_a_number_for_a_text(tmp_path: Path) -> None:
    """`datasets` reads text such as 007 as a number, where the other rows hold parts."""
    text = problem(DataError, lines(tmp_path, [[PICTURED], [{"role": "user", "content": "007"}]], 1))
    assert (
        "row 1: a turn of the prompt is {'role': 'user', 'content': 7}. It needs" in text
        and "12 is read as a number" in text
    )


def test_an_empty_cell_in_a_template(tmp_path: Path) -> None:
    """It would be asked as "None"."""
    text = problem(ConfigError, lines(tmp_path, ["a", None]), prompt_template="Say {prompt}.")
    assert text == "data.prompt_template: does not fit row 1: a column that it names is empty there"


# Text as it is


def test_text_as_it_is(tmp_path: Path) -> None:
    assert load(lines(tmp_path, ["a<|im_end|>", "1"]), prompt_format="text")["prompt"][:] == ["a<|im_end|>", "1"]
    assert "row 1: the prompt is [" in problem(DataError, lines(tmp_path, ["a", [ASKED]]), prompt_format="text")
    assert "row 1: the prompt is ' '" in problem(DataError, lines(tmp_path, ["a", " "]), prompt_format="text")
    assert "data.prompt_format: text that is taken as it is has no place for pictures" in problem(
        ConfigError, lines(tmp_path, ["a", "b"], 1), prompt_format="text"
    )
    assert "data.prompt_format: text that is taken as it is has no place for data.system_prompt" in problem(
        ConfigError, lines(tmp_path, ["a", "b"]), prompt_format="text", system_prompt="S"
    )


# Pictures


@pytest.mark.parametrize(
    ("prompt", "pictures", "expected"),
    [
        ("Look: <image> Which?", 1, [in_parts("Look: ", None, " Which?")]),
        ("Is <image> more than <image>?", 2, [in_parts("Is ", None, " more than ", None, "?")]),
        (
            [SYSTEM, in_parts("<image>\nWhich?")],
            1,
            [{**SYSTEM, "content": [{"type": "text", "text": "You read digits."}]}, in_parts(None, "\nWhich?")],
        ),
        ([in_parts(None, "is <image>?")], 2, [in_parts(None, "is ", None, "?")]),
        ("Which?", 2, [{"role": "user", "content": "Which?"}]),
    ],
)
def test_a_picture_stands_where_the_text_has_its_place(
    prompt: Any, pictures: int, expected: list[Turn], tmp_path: Path
) -> None:
    assert load(lines(tmp_path, [prompt, prompt], pictures))["prompt"][1] == expected


@pytest.mark.parametrize(
    ("prompt", "pictures", "places"),
    [
        ("Is <image> more than <image>?", 1, 2),
        ("Is <image> more?", 2, 1),
        ("Is <image> more?", 0, 1),
        ([in_parts(None, "<image>\nWhich?")], 1, 2),
        ([in_parts("Which?")], 1, 0),
        ([PICTURED], 2, 1),
    ],
)
def test_as_many_places_as_pictures(prompt: Any, pictures: int, places: int, tmp_path: Path) -> None:
    text = problem(DataError, lines(tmp_path, [prompt, prompt], pictures))
    counted = f"Number of images provided ({pictures}) does not match number of image placeholders ({places})"
    assert f"row 0: the images cannot be used: {counted}" in text


# The template


def fit(
    folder: Path, prompts: list[Any], template: str | None = CHAT_TEMPLATE, **data: Any
) -> tuple[list[Any], list[str]]:
    """The prompts as a text model's trainer gets them, and what is said."""
    tokenizer, said = build_tokenizer(["Which digit?"]), list[str]()
    tokenizer.chat_template = template
    rows = fit_prompts(load(lines(folder, prompts), **data), tokenizer, {}, "rows.jsonl", said.append)
    return rows["prompt"][:], said


def test_prompts_that_are_as_they_should_be_are_not_spoken_of(tmp_path: Path) -> None:
    assert fit(tmp_path, [[SYSTEM, ASKED], "What?"]) == ([[SYSTEM, ASKED], [{"role": "user", "content": "What?"}]], [])


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: the model has no chat template"):
        fit(tmp_path, ["a", "b"], None)
    assert fit(tmp_path, ["a", "b"], None, prompt_format="text") == (["a", "b"], [])


@pytest.mark.parametrize(
    ("prompt", "why"), [([SYSTEM, ASKED], "System role not supported"), ([ASKED, ASKED], "roles must alternate")]
)
def test_a_template_that_refuses_a_row(prompt: list[Turn], why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^rows\.jsonl, row 2: the model's chat template refuses this prompt: {why}"):
        fit(tmp_path, [[ASKED], [ASKED, ANSWERED, ASKED], prompt], STRICT)


def test_a_text_model_gets_each_turn_as_one_text(tmp_path: Path) -> None:
    """Qwen3's template drops parts, Llama 3.1's prints the list."""
    prompts, said = fit(tmp_path, [[in_parts("Which ", "digit?")], [ASKED]], STRICT)
    assert prompts == [[ASKED], [ASKED]] and said == []


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("<|im_start|>user\nWhich?<|im_end|>", "have been through a chat template, it seems"),
        ("[INST] Which? [/INST]", "data.prompt_format: text takes them"),
        ([ASKED, ANSWERED], "end with an assistant turn, which TRL closes"),
        ("Write <image> in HTML.", "hold <image> where there is no picture: it stays text"),
    ],
)
def test_what_may_not_be_meant_is_said_once(prompt: Any, told: str, tmp_path: Path) -> None:
    prompts, said = fit(tmp_path, [[ASKED], prompt, prompt])
    assert prompts[1] == ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    (line,) = said
    assert line.startswith("rows.jsonl: 2 of 3 prompts ") and told in line and line.endswith("(first: row 1)")


# Vision models


def vision_processor(tiny: Callable[[str], Path], folder: Path) -> Any:
    path = tiny("qwen3_vl")
    return load_processor(text_config(path, folder).model, str(path))


def test_a_template_in_the_tokenizer_alone_is_taken(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    processor = vision_processor(tiny, tmp_path)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    rows = load(lines(tmp_path, [[SYSTEM, PICTURED], "Look: <image> Which?"], 1))
    assert fit_prompts(rows, processor, {}, "rows.jsonl", pytest.fail) is rows
    assert processor.chat_template == CHAT_TEMPLATE


def test_the_models_own_sign_for_a_picture(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    rows = load(lines(tmp_path, ["Which?", "<|vision_start|><|image_pad|><|vision_end|>Which?"], 1))
    with pytest.raises(DataError, match=r"^rows, row 1: the model's chat template refuses .* holds <\|image_pad\|>"):
        fit_prompts(rows, vision_processor(tiny, tmp_path), {}, "rows", pytest.fail)


def test_a_begun_answer_about_a_picture(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """TRL's own step ends with an IndexError; it is said wherever the row is."""
    rows = load(lines(tmp_path, [*["Which?"] * 150, [PICTURED, ANSWERED], *["Which?"] * 150], 1))
    with pytest.raises(
        DataError, match=r"^rows, row 150: the model's chat template .* TRL closes its assistant turn in"
    ):
        fit_prompts(rows, vision_processor(tiny, tmp_path), {}, "rows", pytest.fail)


@pytest.mark.parametrize("given", [[5], None])
def test_the_image_token_is_never_sampled(given: list[int] | None, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    config = picture_config(tiny("qwen3_vl"), tmp_path, generation_kwargs={"suppress_tokens": given})
    trainer = build_trainer(config, say=lambda line: None)
    assert trainer.generation_config.suppress_tokens == [*(given or []), trainer.model.config.image_token_id]


def test_a_begun_answer_is_closed_by_trl(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """As the page says, and the line at the start."""
    said: list[str] = []
    trainer = build_trainer(
        text_config(tiny("qwen3"), tmp_path),
        say=said.append,
        load=lambda config, say: (load(lines(tmp_path, [[ASKED, ANSWERED]] * 2)), None),
    )
    (ids,), _, _ = trainer._tokenize_prompts([[ASKED, ANSWERED]])
    assert trainer.processing_class.decode(ids).endswith("7<|im_end|>\n<|im_start|>assistant\n")
    assert sum("which TRL closes" in line for line in said) == 1


@pytest.mark.parametrize("prompt", ["Which?", [SYSTEM, ASKED], [SYSTEM, PICTURED], [ASKED, ANSWERED, ASKED]])
def test_a_prompt_has_the_trainers_tokens_in_data_infer_and_merge(
    prompt: Any, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    pictured = isinstance(prompt, list) and PICTURED in prompt
    kind, made, pictures = ("qwen3_vl", picture_config, 1) if pictured else ("qwen3", text_config, None)
    rows = load(lines(tmp_path, [prompt] * 2, pictures))
    trainer = build_trainer(made(tiny(kind), tmp_path), say=lambda line: None, load=lambda config, say: (rows, None))
    read = prompt_of(trainer.train_dataset[0], trainer.processing_class)
    (ids,), _, _ = trainer._tokenize_prompts([read])
    assert inputs_of(read, trainer.processing_class, {})["input_ids"][0].tolist() == list(ids)
