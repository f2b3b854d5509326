"""The process between a parent and its command: nothing that the command starts outlives either.

    python -m grpo_autotune.processes.guardian LIFELINE COMMAND...

It leads a session of its own, starts COMMAND, and waits for the first of two: the command ends, or the pipe LIFELINE (a
file descriptor whose other end only the parent holds) closes, which the kernel does however the parent ends. Then it
kills whatever descends from it, processes in other sessions included (`torchrun` gives each rank its own): it is
their subreaper (prctl(2)), so that none can be orphaned past it. It ends as the command did, by the same signal or with
the same code. It holds no torch and allocates next to nothing, so that it survives where a trial runs out of memory.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

LOOK_S = 0.05
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str]) -> None:
    """Start the command, wait, tidy up, and end as it did."""
    lifeline = int(arguments[0])
    os.set_inheritable(lifeline, False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(arguments[1:])
    code: int | None = None
    while code is None and not _closed(lifeline):
        code = child.poll()
    kill_descendants()
    _end_as(child.wait() if code is None else code)


def kill_descendants() -> None:
    """Kill every process that descends from this one, until there is none."""
    me = psutil.Process()
    while True:
        alive = [process for process in me.children(recursive=True) if _runs(process)]
        if not alive:
            return
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(LOOK_S / 5)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent`, who started it, ends; ends at once where it did already."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _closed(lifeline: int) -> bool:
    readable, _, _ = select.select([lifeline], [], [], LOOK_S)
    return bool(readable) and os.read(lifeline, 1) == b""


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_as(code: int) -> None:
    if code >= 0:
        sys.exit(code)
    signum = -code
    if signum not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


if __name__ == "__main__":
    main(sys.argv[1:])
