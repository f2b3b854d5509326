"""Notes about the environment are said once per environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_autotune.commands import imports
from grpo_autotune.seams import torchvision_compat


def test_a_note_is_said_once_per_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(imports, "ensure_torchvision", lambda: "torchvision was mended")
    imports.mend_torchvision()
    assert capsys.readouterr().err == "note: torchvision was mended\n"
    imports.mend_torchvision()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torchvision_compat, "_version", lambda package: "another")
    imports.mend_torchvision()
    assert capsys.readouterr().err == "note: torchvision was mended\n"
