"""Command lines as settings: Hydra's overrides, and the options of HfArgumentParser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.interop.reading.arguments import hydra_value, options, overrides
from grpo_autotune.interop.source import Setting, Word


def words(*texts: str) -> list[Word]:
    return [Word(text, line) for line, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("512", 512), ("-1", -1), ("1_000", 1000), (".5", 0.5), ("True", True), ("FALSE", False),
        ("null", None), ("None", "None"), ("", ""), ("a,b", "a,b"), ("007", "007"), ("1.0.2", "1.0.2"),
        ("['console','wandb']", ["console", "wandb"]), ('["a", b]', ["a", "b"]), ("[[1,2],[]]", [[1, 2], []]),
        ("{a:1,b:{c:x}}", {"a": 1, "b": {"c": "x"}}), ("{}", {}), ("'12'", "12"), (r"'it\'s'", "it's"),
        ("[a", "[a"), ("{a:1", "{a:1"), ("[]]", "[]]"), ("$(nproc)", "$(nproc)"), ("${data.x}", "${data.x}"),
        ("[${a.b},2]", ["${a.b}", 2]), ("user/geometry@train", "user/geometry@train"), ("'a b", "'a b"),
    ],
)  # fmt: skip
def test_a_value_of_hydra(text: str, value: object) -> None:
    assert hydra_value(text) == value and type(hydra_value(text)) is type(value)


@given(st.text(max_size=30))
def test_any_text_is_some_value(text: str) -> None:
    hydra_value(text)
    overrides([Word(f"a={text}")])
    options([Word(text)])


def test_overrides_by_line_the_last_one_wins() -> None:
    settings = overrides(words("a.b=1", "+c={x:{y:2},z:null}", "++d=[1]", "~e", "-m", "plain", "a.b=4", "f=x=y"))
    assert settings == {
        "a.b": Setting(4, 7), "c.x.y": Setting(2, 2), "c.z": Setting(None, 2), "d": Setting([1], 3),
        "e": Setting(None, 4), "f": Setting("x=y", 8),
    }  # fmt: skip


def test_an_override_keeps_how_it_is_written() -> None:
    assert overrides([Word("+a.b=512", 3, "+a.b=${B:-512}")]) == {"a.b": Setting(512, 3, text="${B:-512}")}


def test_options_of_every_form() -> None:
    settings, first = options(
        words("grpo.yaml", "--lr", "1e-5", "--dataset-name=a/b", "--bf16", "--no_shuffle", "--top_k", "-1", "--rewards",
              "accuracy", "format", "--kwargs", '{"min_lr": 1}', "--empty", "", "--no_cuda", "--lr", "2"),
    )  # fmt: skip
    assert [word.text for word in first] == ["grpo.yaml"]
    assert {name: setting.value for name, setting in settings.items()} == {
        "lr": 2, "dataset_name": "a/b", "bf16": True, "shuffle": False, "top_k": -1, "rewards": ["accuracy", "format"],
        "kwargs": {"min_lr": 1}, "empty": "", "no_cuda": True,
    }  # fmt: skip
    assert settings["lr"].line == 17 and settings["rewards"].line == 9


def test_an_option_keeps_how_it_is_written() -> None:
    settings, _ = options([Word("--lr", 4), Word("1e-6", 2, "$LR"), Word("--beta=0.1", 5, "--beta=$BETA")])
    assert settings == {"lr": Setting(1e-6, 4, text="$LR"), "beta": Setting(0.1, 5, text="$BETA")}


def test_a_false_flag_and_a_false_word_are_the_same() -> None:
    assert options(words("--use_vllm", "False"))[0]["use_vllm"].value is False
