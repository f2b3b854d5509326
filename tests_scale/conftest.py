"""The tests that need DeepSpeed: processes that train together on this machine's CPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import picture_rows, text_rows, tiny  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.exit("tests_scale needs DeepSpeed: `make test-scale` makes the environment that has it", returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.slow)
