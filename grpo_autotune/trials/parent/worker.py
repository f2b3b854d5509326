"""A worker as the parent holds it: a child process behind its guardian, and a pipe for orders."""

import contextlib
import subprocess
import sys
from pathlib import Path

from grpo_autotune.hardware.places import Place
from grpo_autotune.processes.guarded import PYTHON, Guarded, without_rank

CHILD = "grpo_autotune.trials.child.worker"


class Worker(Guarded):
    """A process that runs one trial after another, all on its `place` where it has one. Its output goes to `log` until
    the trial leads it to its own; more than one process are ranks under `torchrun`, which run the one trial in
    `folder`."""

    def __init__(self, folder: Path, log: Path, world_size: int = 1, place: Place | None = None) -> None:
        words = [*PYTHON, "-m", CHILD]
        if world_size > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
            words = [sys.executable, *launch, "-m", CHILD, str(folder.absolute())]
        environment = without_rank()
        with contextlib.nullcontext() if place is None else place.pinned():
            environment |= {} if place is None else place.environment(world_size, environment)
            super().__init__(words, log, environment, subprocess.PIPE)

    def order(self, folder: Path) -> bool:
        """Name a trial to run; return whether the process is alive to read it."""
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
