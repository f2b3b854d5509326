"""The real language model of `examples`, for tests: SmolLM2-135M-Instruct, made once in the cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.smollm2 import model_folder
from grpo_autotune.errors import EnvironmentProblem


def real_model() -> Path:
    """The folder, made where it is not there; skips the test where the packages cannot be had."""
    try:
        return model_folder()
    except EnvironmentProblem as error:
        pytest.skip(str(error))
