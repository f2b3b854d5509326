"""Where the package keeps what it made or measured once: models, downloads, ceilings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """The package's cache folder, created on first use: `GRPO_AUTOTUNE_CACHE`, else the XDG cache folder's."""
    own = os.environ.get("GRPO_AUTOTUNE_CACHE")
    if own:
        folder = Path(own).expanduser()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "grpo-autotune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new, never a part: beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
