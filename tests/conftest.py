"""Fixtures that are dear to build: each once a session."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_model

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: the commands under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(kind)`: path of a saved tiny model (qwen2_5_vl, qwen3_vl, qwen3 or llama)."""
    folder = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in built:
            built[kind] = tiny_model(kind, folder)
        return built[kind]

    return path


@pytest.fixture(scope="session")
def picture_rows() -> list[dict[str, Any]]:
    """Four rows of a vision data set: `prompt` (conversational), `image` (PIL, 56 px, one colour each), `answer`."""
    from PIL import Image

    question = [{"role": "user", "content": "What is shown?"}]
    return [
        {"prompt": question, "image": Image.new("RGB", (56, 56), (40 * row, 90, 200 - 40 * row)), "answer": str(row)}
        for row in range(4)
    ]


@pytest.fixture(scope="session")
def text_rows() -> list[dict[str, Any]]:
    """Four rows of a text data set: `prompt` (conversational), `answer`."""
    return [
        {"prompt": [{"role": "user", "content": f"What is {row} plus three?"}], "answer": str(row + 3)}
        for row in range(4)
    ]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    """Take every speed-up off again: one of its layers is on a function that all models share."""
    from grpo_autotune.speedups import install

    made = []
    put_on = install.SpeedUps.__init__

    def remember(speedups, *args, **kwargs):
        put_on(speedups, *args, **kwargs)
        made.append(speedups)

    monkeypatch.setattr(install.SpeedUps, "__init__", remember)
    yield
    for speedups in made:
        speedups.remove()
