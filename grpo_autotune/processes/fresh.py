"""This process begun anew: the same command in the same process of the system, with nothing of its memory."""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

OPEN_FILES = Path("/proc/self/fd")
STANDARD = 3
"""Open files that the command keeps: input, output and errors."""


def start_anew(options: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run this process's own command again in its place, with those `options` that it does not have yet. Launchers and
    shells see one process; its threads, its memory on any device and its open files are gone, workers are killed."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for file in list(OPEN_FILES.iterdir()) if OPEN_FILES.is_dir() else ():
        if int(file.name) >= STANDARD:
            with contextlib.suppress(OSError):  # the folder's own
                os.set_inheritable(int(file.name), False)
    words = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, [*words, *(option for option in options if option not in words)], environment)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])
