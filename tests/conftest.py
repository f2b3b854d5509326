"""Which tests are slow and what the others may not do, and fixtures that are costly to build: each once per session."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist import is_xdist_controller

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: the commands under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("untimed")

SLOW_FIXTURES = {"tiny", "quick_model"}
"""A test that asks for one of these trains or loads a model, and is marked `slow`."""
CHILD_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"}
"""Audit events of Python that announce a child process."""

fast_test: pytest.Item | None = None
"""The test under way, if it is not marked `slow`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_sessionstart(session: pytest.Session) -> None:
    if is_xdist_controller(session):  # runs no test, and needs none of the libraries
        return
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import grpo_autotune.train  # noqa: F401 - mends torchvision, which test modules import with TRL

    register_optimizer_step_pre_hook(_refuse_step)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global fast_test
    fast_test = None if item.get_closest_marker("slow") else item
    try:
        return (yield)
    finally:
        fast_test = None


def pytest_configure() -> None:
    gc.disable()  # until all is imported: a training begins with a full collection, 0.4 s with the libraries in sight
    sys.addaudithook(_refuse_child)


def _refuse_child(event: str, args: tuple[Any, ...]) -> None:
    if event in CHILD_EVENTS and args[:1] != ("uname",):  # Python's own module platform asks it, once per process
        _refuse(" ".join(map(str, ["starts a child process:", event, *args[:1]])))


def _refuse_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    _refuse(f"trains ({type(optimizer).__name__}.step)")


def _refuse(action: str) -> None:
    """Fail the test under way, in every run: else `make test-fast` would grow slow unnoticed."""
    if fast_test is not None:
        pytest.fail(f"{fast_test.nodeid} {action}: mark it with pytest.mark.slow")


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
    from tests.support.tiny import tiny_model

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
