"""The package's cache folder, files that are written whole or not at all, and disks that are full."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError, EnvironmentProblem

FULL = ("No space left", "quota exceeded", "Not enough disk space", "PytorchStreamWriter", "unexpected pos")
"""Words of errors on a full disk: the system's, those of `datasets`, and of `torch.save`, which gives no reason."""


def cache_dir(part: str = "") -> Path:
    """The folder for models, downloads and measured ceilings, or a part of it, created on first use (EnvironmentProblem
    where it cannot be): `GRPO_AUTOTUNE_CACHE`, else `grpo-autotune` in `XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("GRPO_AUTOTUNE_CACHE")
    if chosen:
        folder = Path(chosen).expanduser()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "grpo-autotune"
    try:
        (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the cache folder cannot be made ({error.strerror})"
        fix = "Point GRPO_AUTOTUNE_CACHE to a folder that can be written."
        raise EnvironmentProblem(what, where=str(folder / part), fix=fix) from error
    return folder / part


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file, of text as UTF-8, so that a reader sees the old content or the new, never a part of it.

    The content goes into a new file beside `path`, with the permissions that the umask gives; complete, it takes the
    name. A file that cannot be written (OSError: the disk is full, or the folder is missing or cannot be written)
    leaves nothing behind, and what was at `path` before stays. `durable` waits until the disk holds content and name,
    so that a power cut cannot undo them; that is not worth it for a message between running processes."""
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with draft.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def read_mapping(path: Path) -> dict[str, Any] | None:
    """The mapping that a JSON file holds; None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can; the content is on the disk by then
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def full_disk_told(folder: Path, fix: str = "Make room, and go on with --resume.") -> Iterator[None]:
    """Turn a full disk into one line, an EnvironmentProblem, whoever writes inside, mostly to `folder`, and whatever
    that raises."""
    try:
        yield
    except Exception as error:
        links = (error, error.__cause__, error.__context__)
        link = next((link for link in links if any(words in str(link) for words in FULL)), None)
        if link is None:
            raise
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        what = f"the disk is full: {link} ({shutil.disk_usage(place).free} bytes are free)"
        raise EnvironmentProblem(what, where=str(folder), fix=fix) from error


@contextmanager
def refusal_told() -> Iterator[None]:
    """Turn a file or folder that may not be read into a `ConfigError`."""
    try:
        yield
    except PermissionError as error:
        fix = "Ask its owner, or name another one."
        raise ConfigError("this cannot be read (Permission denied)", where=str(error.filename), fix=fix) from error


def is_file(path: str | Path) -> bool:
    """True if a file is there (`~` is the home); False too for a text that cannot be a path, where pathlib raises."""
    with suppress(OSError, RuntimeError):  # a name that is too long, the home of a user that there is not
        return Path(path).expanduser().is_file()
    return False


def is_folder(path: str | Path) -> bool:
    """The same for a folder."""
    with suppress(OSError, RuntimeError):
        return Path(path).expanduser().is_dir()
    return False
