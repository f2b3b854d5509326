"""Every test of this folder needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use is here"))
