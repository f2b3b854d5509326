"""A command as its parent holds it: a guardian's session, and a pipe whose end ends them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_")
"""How the variables begin that torchrun sets beside them; by one of them a process waits for the launcher's store."""
END_S = 10.0
"""What a guardian has to tidy up before it is killed with its group."""

GONE_S = 60.0
"""Seconds after which a killed process counts as one that cannot be killed: it waits inside the system, such as in the
driver of a GPU."""

LOOK_S = 0.05

PYTHON = [sys.executable, "-P"]
"""Without the current folder on the path: a folder `vllm` of the user's there would pass for an installed vLLM."""


class Guarded:
    """A command behind its guardian, in a session of its own: nothing that it starts outlives it or this process."""

    def __init__(
        self,
        words: Sequence[str],
        log: Path,  # standard output and error
        environment: Mapping[str, str] | None = None,  # this process's without
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        read, self._lifeline = os.pipe()
        guardian = [*PYTHON, "-m", "grpo_autotune.processes.guardian", str(read)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*guardian, *words],
                stdin=stdin, stdout=file, stderr=file, pass_fds=(read,), start_new_session=True, env=environment,
            )  # fmt: skip
        os.close(read)
        self._left: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, signum: int) -> None:
        """Pass a signal on to the command, past its guardian."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                child.send_signal(signum)

    def wait(self, limit_s: float) -> int | None:
        """Wait for the end; its exit code (negative: a signal), None where it still runs."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    @property
    def is_lost(self) -> bool:
        """True while a process of it lives on, though it was killed."""
        return any(_lives(process) for process in self._left)

    def end(self) -> None:
        """Kill it and all it started, and wait until they are gone, `GONE_S` at most (see `is_lost`)."""
        descendants = _descendants(self.pid)
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self.wait(END_S) is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self.wait(GONE_S)
        for process in descendants:  # still there only if the guardian was killed before it could do this
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._left = until_gone(descendants)


def until_gone(
    processes: Sequence[psutil.Process],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> list[psutil.Process]:
    """Wait until killed processes are gone, `GONE_S` at most; those that are still there."""
    begun, left = clock(), list(processes)
    while (left := [process for process in left if _lives(process)]) and clock() - begun < GONE_S:
        wait(LOOK_S)
    return left


def exit_words(code: int) -> str:
    """An exit code in words: `exit code 3`, or the name of the signal (a negative code)."""
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"


def _lives(process: psutil.Process) -> bool:
    """Return whether a process holds anything; a zombie does only while one of its threads is stuck."""
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def without_rank() -> dict[str, str]:
    """The parent's, less what makes a rank: a search may itself have been started by a launcher."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith(LAUNCHERS)
    }
