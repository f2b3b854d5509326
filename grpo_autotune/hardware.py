"""What this machine is: where the package keeps what it measured."""

from __future__ import annotations

import os
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
