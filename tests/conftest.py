"""Fixtures that are costly to build: each once per session."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_model

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: the commands under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(autouse=True)
def no_speedup_left() -> Iterator[None]:
    """Take off what a test left on: one layer is on a function that all models share, others hold their trainer."""
    yield
    install = sys.modules.get("grpo_autotune.speedups.install")
    for speedups in install.installed() if install else ():
        speedups.remove()


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
