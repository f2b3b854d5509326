"""The cores of this process: a trial beside others keeps to some of them, and the next may have them all again."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

_ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
_THREADS = torch.get_num_threads()
_last = [_ALL]
"""The cores of the last trial."""


def keep_to(cores: Sequence[int]) -> None:
    """Compute on these cores alone, with no more threads; on all that this process was given where there are none.
    Where a system keeps no process to cores, only the threads are fewer. Without a change nothing is touched: code of
    the user's may have set threads of its own, which count in all trials alike."""
    wanted = set(cores) or _ALL
    if wanted == _last[0]:
        return
    _last[0] = wanted
    if _ALL:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread.name), wanted)
    torch.set_num_threads(min(_THREADS, len(wanted) or _THREADS))
