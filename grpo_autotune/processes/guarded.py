"""Workers as the parent holds them: a guardian's session each, a pipe for orders, and a pipe whose end ends them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_")
"""How the variables begin that torchrun sets beside them; by one of them a process waits for the launcher's store."""
END_S = 10.0
"""What a guardian has to tidy up before it is killed with its group."""


class Worker(Protocol):
    """What a runner needs of a worker."""

    @property
    def pid(self) -> int: ...
    def order(self, folder: Path) -> bool:
        """Name a trial to run; whether there is still somebody to hear it."""

    def poll(self) -> int | None:
        """Exit code (negative: a signal), None while it runs."""

    def end(self) -> None:
        """Kill it and all it started, and wait until they are gone."""


PYTHON = [sys.executable, "-P"]
"""Without the current folder on the path: a folder `vllm` of the user's there would pass for an installed vLLM."""


class Guarded:
    """A command behind its guardian, in a session of its own: nothing that it starts outlives it, nor this process.

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


class GuardedWorker(Guarded):
    """A worker behind its guardian.

    Args:
        folder: Of its first trial; its log gets what is written before the trial begins.
        log: Standard output and error.
        world_size: More than one are ranks under `torchrun`, which serve that one trial.
    """

    def __init__(self, folder: Path, log: Path, world_size: int = 1) -> None:
        words = [*PYTHON, "-m", "grpo_autotune.trials.child.worker"]
        if world_size > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
            words = [sys.executable, *launch, "-m", "grpo_autotune.trials.child.worker", str(folder.absolute())]
        super().__init__(words, log, without_rank(), subprocess.PIPE)

    def order(self, folder: Path) -> bool:
        if self._process.stdin is None or self._process.poll() is not None:
            return False
        try:
            self._process.stdin.write(f"{folder.absolute()}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def end(self) -> None:
        super().end()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def oom_kills() -> int:
    """Processes that the kernel has killed for memory so far: in this cgroup, or in the system if that is unknown."""
    for path in _counters():
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found is not None:
            return int(found[1])
    return 0


def _counters() -> list[Path]:
    """Where the kernel counts them: cgroup v2's `memory.events`, v1's `memory.oom_control`, and `/proc/vmstat`."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    v1 = Path("/sys/fs/cgroup/memory")
    found = [v1.parent / path.lstrip("/") / "memory.events" for _, of, path in rows if not of]
    found += [v1 / path.lstrip("/") / "memory.oom_control" for _, of, path in rows if "memory" in of.split(",")]
    return [*found, Path("/proc/vmstat")]


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
