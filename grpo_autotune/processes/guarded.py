"""A command as its parent holds it: a guardian's session, and a pipe whose end ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_")
"""How the variables begin that torchrun sets beside them; by one of them a process waits for the launcher's store."""
END_S = 10.0
"""What a guardian has to tidy up before it is killed with its group."""


PYTHON = [sys.executable, "-P"]
"""Without the current folder on the path: a folder `vllm` of the user's there would pass for an installed vLLM."""


class Guarded:
    """A command behind its guardian, in a session of its own: nothing that it starts outlives it or this process.

    Args:
        words: The command.
        log: Standard output and error.
        environment: The command's; this process's without.
        stdin: As in `subprocess.Popen`.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
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

    def end(self) -> None:
        descendants = _descendants(self.pid)
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self.wait(END_S) is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for process in descendants:  # still there only if the guardian was killed before it could do this
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=END_S)


def exit_words(code: int) -> str:
    """An exit code in words: `exit code 3`, or the name of the signal (a negative code)."""
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"


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
