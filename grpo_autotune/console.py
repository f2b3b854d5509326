"""Where words go: reports to standard output, progress to standard error, and both from the first rank only."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED_EXIT = 128 + signal.SIGINT


def is_first_rank() -> bool:
    """Whether this process is rank 0 under `torchrun`, or runs alone."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """A line of progress."""
    if is_first_rank():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def warn(sentence: str) -> None:
    """A sentence that the user should not miss."""
    say(f"warning: {sentence}")


def complain(line: str, *, everywhere: bool) -> None:
    """Why a command failed: from the first rank, and `everywhere` from each, since another rank may fail alone."""
    if is_first_rank():
        say(line)
    elif everywhere:
        sys.stderr.write(f"rank {os.environ['RANK']}: {line}\n")
        sys.stderr.flush()


@contextmanager
def output_aside() -> Iterator[None]:
    """Lead standard output to standard error meanwhile, that of other libraries and of child processes included."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(text: str) -> None:
    """A result."""
    if is_first_rank():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
