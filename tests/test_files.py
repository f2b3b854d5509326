"""Files written whole or not at all: permissions, a full disk, an interruption."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import full_disk_told, write_whole


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes, as a disk that is nearly full would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_whole(tmp_path / "report.json", "{}")
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("durable", [True, False])
def test_text_is_utf_8_and_bytes_are_as_they_are(tmp_path: Path, durable: bool) -> None:
    write_whole(tmp_path / "text", "grün\r\n", durable=durable)
    write_whole(tmp_path / "text", "µ\n", durable=durable)
    write_whole(tmp_path / "bytes", b"\xff\r\n", durable=durable)
    assert (tmp_path / "text").read_bytes() == "µ\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\xff\r\n"
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bytes"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    write_whole(path, "old")
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "else the limit kills"
    with largest_file(10), pytest.raises(OSError, match="File too large"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", "text")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_and_stays_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "a.json", "text")
    assert not list(tmp_path.iterdir())


def write_text(path: str) -> None:
    Path(path).write_text("x")


def write_tensors(path: str) -> None:
    import torch

    torch.save({"weight": torch.zeros(1000)}, path)


def fail_as_safetensors_does(path: str) -> None:
    """It writes a file of its own beside the path and renames it: as root, over a device."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [write_text, write_tensors, fail_as_safetensors_does])
def test_a_full_disk_is_one_line_whoever_writes(tmp_path: Path, write: Callable[[str], None]) -> None:
    line = r"/new/run: the disk is full: .* \(\d+ bytes are free\)\. Go\."
    with pytest.raises(EnvironmentProblem, match=line), full_disk_told(tmp_path / "new" / "run", "Go."):
        write("/dev/full")


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path):
        write_text(str(tmp_path / "missing" / "file"))
