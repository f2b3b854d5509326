"""The machine between two workers: the last one's processes are gone, and what it had of the GPUs' memory is back."""

from collections.abc import Callable, Sequence

from grpo_autotune.hardware.nvml import ask, driver, visible_handles
from grpo_autotune.trials.endings import Ending
from grpo_autotune.trials.parent.worker import Worker

BACK_S = 60.0
"""Seconds that memory has to come back; usually it takes less than two."""

STILL_S = 10.0
"""Seconds without a fall after which what is in use is somebody else's."""

LOOK_S = 0.2
SLACK_BYTES = 256 << 20

GPU_LOST = (
    "gpu lost: a process of a trial was killed and does not end, as one does that waits for a GPU's driver. Reset the "
    "GPU (nvidia-smi --gpu-reset), or restart the machine"
)


class Recovery:
    """The wait for what ended workers held: `used` tells the bytes in use on the GPUs, None where nobody tells."""

    def __init__(
        self, used: Callable[[], int | None], clock: Callable[[], float], wait: Callable[[float], None]
    ) -> None:
        self._used, self._clock, self._wait = used, clock, wait
        self._workers: list[Worker] = []
        self._before: int | None = None

    def watch(self, worker: Worker) -> Worker:
        self._workers.append(worker)
        return worker

    def lost(self) -> Ending | None:
        """The ending of every trial while a worker that was ended lives on, else None."""
        return Ending("crashed", GPU_LOST) if any(worker.is_lost for worker in self._workers) else None

    def before_start(self, *, others: bool) -> None:
        """Wait until the GPUs' memory is as it was before the last worker started, unless `others` of the search's
        processes hold memory, of which nobody knows how much."""
        self._workers = [worker for worker in self._workers if worker.poll() is None or worker.is_lost]
        if others or self._workers:
            self._before = None
            return
        if self._before is not None:
            self._until_back(self._before)
        self._before = self._used()

    def _until_back(self, before: int) -> None:
        used = self._used() or 0
        begun = fell = now = self._clock()
        while used > before + SLACK_BYTES and now - begun < BACK_S and now - fell < STILL_S:
            self._wait(LOOK_S)
            last, used, now = used, self._used() or 0, self._clock()
            fell = now if used < last else fell


def used_gpu_bytes(only: Sequence[str] | None = None) -> int | None:
    """Memory in use on the GPUs that CUDA shows this process, or `only` on these of them, by whomever; None where NVML
    tells of none."""
    with driver() as nvml:
        told = (ask(nvml, "nvmlDeviceGetMemoryInfo", handle) for handle in visible_handles(nvml, only))
        used = [int(memory.used) for memory in told if memory is not None]
    return sum(used) if used else None
