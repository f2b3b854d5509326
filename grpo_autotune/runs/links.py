"""Names for checkpoints: `best` and `last` in a run folder, and `epoch-7` beside `checkpoint-70`, as relative links."""

import os
from contextlib import suppress
from pathlib import Path

from grpo_autotune.console import warn
from grpo_autotune.runs.checkpoints import WEIGHTS_ONLY, survey

_refused: set[Path] = set()
"""Folders whose file system has no links, as was said once."""


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder whose weights can be used, by step, the newest first."""
    return {one.step: one.path for one in survey(folder) if one.flaw in (None, WEIGHTS_ONLY)}


def link(place: Path, target: Path | None) -> None:
    """Let `place` point to a folder, or to nothing; what is there and is no link stays."""
    if place.parent in _refused or (place.exists() and not place.is_symlink()):
        return
    try:
        draft = place.with_name(f".{place.name}.link")
        draft.unlink(missing_ok=True)
        if target is None:
            place.unlink(missing_ok=True)
        else:
            draft.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)
            draft.replace(place)
    except OSError as error:
        _refused.add(place.parent)
        warn(f"no links to checkpoints in {place.parent} ({error.strerror}): name them as checkpoint-STEP")


def link_epoch(checkpoint: Path, epoch: float | None) -> None:
    """Name a checkpoint by its epoch too, where that is whole, and remove names whose checkpoints are gone."""
    if epoch and abs(epoch - round(epoch)) < 1e-6:
        link(checkpoint.with_name(f"epoch-{round(epoch)}"), checkpoint)
    for name in checkpoint.parent.glob("epoch-*"):
        if name.is_symlink() and not name.exists():
            with suppress(OSError):
                name.unlink()


def links_to(checkpoint: Path, run: Path) -> list[str]:
    """The names of links to a checkpoint."""
    places = [run / "best", run / "last", *sorted(checkpoint.parent.glob("epoch-*"))]
    return [place.name for place in places if place.is_symlink() and place.resolve() == checkpoint.resolve()]
