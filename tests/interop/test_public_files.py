"""Public files import as they are expected to; skipped where the repositories are not at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from public_files import Public, listed, outcome


@pytest.mark.slow
@pytest.mark.skipif("GRPO_AUTOTUNE_MIRRORS" not in os.environ, reason="needs the public repositories")
@pytest.mark.parametrize(
    "file", listed() if "GRPO_AUTOTUNE_MIRRORS" in os.environ else [None], ids=lambda file: file and file.name
)
def test_a_public_file(file: Public) -> None:
    came = outcome(file)
    assert came == "imports" if file.outcome == "imports" else file.outcome in came
