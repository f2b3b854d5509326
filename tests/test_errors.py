"""The name that was probably meant, and one line from its parts."""

from __future__ import annotations

import pytest

from grpo_autotune.errors import LONGEST, ConfigError, nearest, nearest_hint, nearest_path

PATHS = ["grpo.beta", "grpo.num_generations", "vllm.max_model_len", "data.image_size", "data.name", "output.name"]


def test_the_parts_of_an_error_are_one_line() -> None:
    assert str(ConfigError("unknown\nkey.", where="grpo.betta", fix=" Nearest: grpo.beta.")) == (
        "grpo.betta: unknown key. Nearest: grpo.beta."
    )


def test_a_hint_names_the_nearest_or_says_something_else() -> None:
    assert nearest("exact_mach", ["exact_match", "box_iou"]) == "exact_match"
    assert nearest("zzz", ["exact_match", "box_iou"]) is None
    assert nearest_hint("exact_mach", ["exact_match"], "Known: exact_match.") == "Nearest: exact_match."
    assert nearest_hint("zzz", ["exact_match"], "Known: exact_match.") == "Known: exact_match."
    assert nearest_hint("zzz", []) == ""


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("vllm.beta", "grpo.beta"),
        ("beta", "grpo.beta"),
        ("model.name", "data.name"),
        ("vllm.max_model_lne", "vllm.max_model_len"),
        ("vllm.num_generation", "grpo.num_generations"),
        ("data.imagesize", "data.image_size"),
        ("grpo.zzz", None),
    ],
)
def test_the_same_key_elsewhere_comes_before_a_similar_one(path: str, meant: str | None) -> None:
    assert nearest_path(path, PATHS) == meant


def test_a_long_message_keeps_its_short_parts_and_is_cut_in_the_middle() -> None:
    line = str(ConfigError("x" * 5000 + "!", where="data.path", fix="Remove it."))
    assert len(line) <= LONGEST
    assert line.startswith("data.path: xxx") and line.endswith("xxx!. Remove it.") and " ... " in line
    every = str(ConfigError("w" * 900, where="a" * 900, fix="f" * 900))
    assert len(every) <= LONGEST and all(letter * 50 in every for letter in "awf")


def test_control_characters_are_shown_as_escapes() -> None:
    assert str(ConfigError("a\x00b\x1b[31m\ud800", where="k", fix="né\t\n你")) == "k: a\\x00b\\x1b[31m\\ud800. né 你"
