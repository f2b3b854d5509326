"""Where words go: reports to standard output, progress to standard error, and both from the first rank only."""

from __future__ import annotations

import os
import sys


def is_first_rank() -> bool:
    """Whether this process is rank 0 under `torchrun`, or runs alone."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """A line of progress."""
    if is_first_rank():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """A result."""
    if is_first_rank():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
