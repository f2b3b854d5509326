"""Notes about the environment are said once per environment."""

from __future__ import annotations

import os
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


def test_kernels_are_kept_in_the_cache_and_the_users_word_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_DEVICE_ORDER", *imports.COMPILED):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    imports.set_environment()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ, "a cache that cannot be made ends no command"
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    imports.set_environment()
    compiled = tmp_path / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(compiled / "inductor")
    assert (os.environ["TRITON_CACHE_DIR"], os.environ["VLLM_CACHE_ROOT"]) == ("/mine", str(compiled / "vllm"))
