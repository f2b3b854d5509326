"""The file by which a parent lets trials run in turns: how many blocks a trial may have done, or the word to stop.

The first block is the warm-up. The child looks there at a block's end, and tells by its heartbeat that it waits.
"""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.files import write_whole

TURN_FILE = "turn"
STOP = "stop"
WAITING = "waiting for its turn after block "


def allow(folder: Path, blocks: int | None) -> None:
    """Let the trial in `folder` go on until it has done `blocks` blocks in all; None ends it."""
    write_whole(folder / TURN_FILE, STOP if blocks is None else str(blocks), durable=False)


def allowed(folder: Path) -> int | None:
    """How many blocks the trial may have done; None where it is to stop."""
    text = (folder / TURN_FILE).read_text()
    return None if text == STOP else int(text)


def in_turns(folder: Path) -> bool:
    """Whether the trial in `folder` is to take turns."""
    return (folder / TURN_FILE).exists()


def blocks_done(stage: str) -> int | None:
    """How many blocks a trial has done that waits; None for one that does not wait."""
    return int(stage.removeprefix(WAITING)) if stage.startswith(WAITING) else None
