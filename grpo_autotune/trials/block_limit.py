"""The file by which a parent interleaves trials: it limits the blocks that a trial may have run, or tells it to stop.

The first block is the warm-up. The child reads the file at a block's end, and tells by its heartbeat that it waits.
"""

from pathlib import Path

from grpo_autotune.files import write_whole

LIMIT_FILE = "turn"
STOP = "stop"
WAITING = "waiting for its turn after block "


def set_block_limit(folder: Path, blocks: int | None) -> None:
    """Let the trial in `folder` go on until it has run `blocks` blocks in all; None ends it."""
    write_whole(folder / LIMIT_FILE, STOP if blocks is None else str(blocks), durable=False)


def block_limit(folder: Path) -> int | None:
    """Number of blocks that the trial may have run; None where it is to stop."""
    text = (folder / LIMIT_FILE).read_text()
    return None if text == STOP else int(text)


def is_interleaved(folder: Path) -> bool:
    """Return whether the trial in `folder` is interleaved with others."""
    return (folder / LIMIT_FILE).exists()


def blocks_done(stage: str) -> int | None:
    """Number of blocks that a waiting trial has run, read from its stage; None for one that does not wait."""
    return int(stage.removeprefix(WAITING)) if stage.startswith(WAITING) else None
