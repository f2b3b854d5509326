"""A checkpoint is whole when every file that was written is there at its full size; a marker, written last, says so.

A run that was killed while saving leaves a torn folder. `survey` finds the newest whole one beneath it, in a folder
of `checkpoint-<step>` folders as transformers names them. A checkpoint that plain transformers wrote has no marker:
it counts as whole when what a resumed run loads from it opens. Relative links name checkpoints: `best` and `last` in
the run folder, and `epoch-7` beside `checkpoint-70`.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from grpo_autotune.console import warn
from grpo_autotune.files import read_mapping, write_whole

MARKER = "complete.json"
TORN_PREFIX = "torn-"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "adapter_model.bin", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARDED_OPTIMIZER = ("global_step*", "optimizer_*", "pytorch_model_fsdp*")
"""Folders that DeepSpeed and FSDP write in place of `optimizer.pt`."""

WHOLE = "no sharding"
FSDP_FILES = {"FULL_STATE_DICT": "pytorch_model_fsdp.bin", "SHARDED_STATE_DICT": "pytorch_model_fsdp_0"}
"""`state_dict_type` of FSDP -> what accelerate writes for it."""
WEIGHTS_ONLY = "it holds weights without the optimizer's state (grpo.save_only_model)"
"""The flaw of a checkpoint that is whole but for what training needs to go on."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-<step>`, saved after `step` optimizer steps; `flaw` says why it cannot be resumed from."""

    path: Path
    step: int
    flaw: str | None


def survey(folder: Path) -> list[Checkpoint]:
    """All checkpoints in a folder, newest first, each judged."""
    folders = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []  # glob hides errors
    saved = [(int(match[1]), path) for path in folders if (match := _NAME.fullmatch(path.name))]
    return [Checkpoint(path, step, find_flaw(path)) for step, path in sorted(saved, reverse=True)]


def seal(folder: Path, world_size: int, completions: int, earlier: Iterable[int] = ()) -> None:
    """Write the marker: every file below `folder` with its size in bytes, the number of processes that wrote it, and
    the batch: its completions per step, and the numbers of processes that had it, `earlier` ones of the run too."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MARKER, None)
    batch = {"completions": completions, "processes": sorted({*earlier, world_size})}
    write_whole(folder / MARKER, json.dumps({"world_size": world_size, "batch": batch, "files": files}, indent=1))


def batch_of(folder: Path) -> tuple[int, list[int]]:
    """Completions per step of the run that saved a checkpoint, and the numbers of processes that it has had; 0 and none
    where it has no marker of ours."""
    batch = (read_mapping(folder / MARKER) or {}).get("batch", {})
    return batch.get("completions", 0), batch.get("processes", [])


class SavedBy(NamedTuple):
    """The processes that saved a checkpoint, and how they shared the model."""

    kind: str  # `WHOLE`, `ZeRO-0`, `ZeRO-1 or 2`, `ZeRO-3`, `FSDP (FULL_STATE_DICT)`
    processes: int  # 1 where nothing tells


def saved_by(folder: Path) -> SavedBy:
    """The processes that saved a checkpoint, as its files tell."""
    told = (read_mapping(folder / MARKER) or {}).get("world_size", 1)
    if parts := list(folder.glob("global_step*/*_optim_states.pt")):
        whole = any(folder.glob("global_step*/mp_rank_*_model_states.pt"))
        return SavedBy("ZeRO-1 or 2" if whole else "ZeRO-3", len(parts))
    if any(folder.glob("global_step*")):
        return SavedBy("ZeRO-0", told)
    of_fsdp = (f"FSDP ({kind})" for kind, name in FSDP_FILES.items() if (folder / name).exists())
    return SavedBy(next(of_fsdp, WHOLE), told)


def set_aside(checkpoint: Checkpoint) -> Path:
    """Rename a torn checkpoint so that a later save of the same step starts from an empty folder; its new path."""
    target = checkpoint.path.with_name(TORN_PREFIX + checkpoint.path.name)
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.path.with_name(f"{TORN_PREFIX}{checkpoint.path.name}-{number}")
    checkpoint.path.rename(target)
    return target


def find_flaw(folder: Path) -> str | None:
    """The reason why a checkpoint cannot be resumed from, in a few words; None when it is whole."""
    marker = read_mapping(folder / MARKER)
    return _sealed_flaw(folder, marker) if marker else _plain_flaw(folder)


def _sealed_flaw(folder: Path, marker: dict[str, Any]) -> str | None:
    for name, size in marker.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    if not any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin")) and not _sharded(folder):
        return WEIGHTS_ONLY
    return None


def _plain_flaw(folder: Path) -> str | None:
    """Judge a folder without a marker: `trainer_state.json` is the last file that transformers writes."""
    if read_mapping(folder / "trainer_state.json") is None:
        return "trainer_state.json is missing or cut short"
    if _sharded(folder):
        return None
    weights = _weight_files(folder)
    if not weights:
        return "it holds no weights"
    for path in [*weights, folder / "optimizer.pt", folder / "scheduler.pt"]:
        if not path.is_file():
            return f"{path.name} is missing"
        if not _opens(path):
            return f"{path.name} is cut short"
    return None


def _weight_files(folder: Path) -> list[Path]:
    for name in _INDEXES:
        index = read_mapping(folder / name)
        if index is not None:
            return [folder / shard for shard in sorted(set(index.get("weight_map", {}).values()))]
    return [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]


def _opens(path: Path) -> bool:
    """True if a file is complete: safetensors checks its length against its header, a zip's directory is at its end."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(str(path), framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


def _sharded(folder: Path) -> bool:
    return any(path.is_dir() for pattern in _SHARDED_OPTIMIZER for path in folder.glob(pattern))


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
