"""The bench of a stage: its device, its sizes, its deadline, and the rows that it writes."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_autotune.files import write_whole

FILE = "gpu.json"
LINES = 12
"""Lines of a traceback that are kept."""


class OutOfTime(BaseException):
    """A stage's time is over."""


@dataclass(frozen=True)
class Row:
    """One measurement beside its prediction.

    Attributes:
        predicted: Lowest and highest value that was expected; None where nobody ventured one.
        measured: A number, or a text.
        ok: Whether a bar was met; None where there is none.
    """

    stage: str
    name: str
    measured: float | str | None
    unit: str = ""
    predicted: tuple[float, float] | None = None
    ok: bool | None = None
    note: str = ""


@dataclass
class Outcome:
    """The file `gpu.json`: rewritten whole whenever something is added."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """The outcome in a folder, as far as it has come; a new one where there is none."""
        path = folder / FILE
        new: dict[str, Any] = {"name": "gpu_check", "machine": {}, "under_way": None, "stages": {}, "rows": []}
        return cls(path, json.loads(path.read_text()) if path.exists() else new)

    def add(self, row: Row) -> None:
        """Append a row; numbers that are none become text, which JSON can hold."""
        told = asdict(row)
        if isinstance(row.measured, float) and not math.isfinite(row.measured):
            told["measured"] = str(row.measured)
        self.content["rows"].append(told)
        self.write()

    def begin(self, stage: str) -> None:
        """Note which stage is under way."""
        self.content["under_way"] = stage
        self.write()

    def close(self, stage: str, seconds: float, error: str | None, cpu_s: float = 0.0) -> None:
        """Note how a stage ended; `cpu_s` are the seconds of its processes on any core."""
        self.content["under_way"] = None
        self.content["stages"][stage] = {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "error": error}
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_whole(self.path, json.dumps(self.content, indent=1))


class Bench:
    """A stage's means of measuring and telling.

    Args:
        stage: Its name.
        outcome: Where rows go.
        device: `cuda` or `cpu`.
        tiny: Tiny shapes, to see that every line runs.
        out: Folder of what is kept.
        scratch: Folder of what is not.
        until: When the stage has to be over, on `time.monotonic`.
    """

    def __init__(
        self, stage: str, outcome: Outcome, *, device: str, tiny: bool, out: Path, scratch: Path, until: float
    ) -> None:
        import torch

        self.stage, self.outcome, self.tiny, self.out, self.scratch = stage, outcome, tiny, out, scratch
        self.device = torch.device(device)
        self.on_gpu = device == "cuda"
        self.until = until

    def left(self) -> float:
        """Seconds until the stage's deadline."""
        return self.until - time.monotonic()

    def row(
        self,
        name: str,
        measured: float | str | None,
        unit: str = "",
        *,
        predicted: tuple[float, float] | None = None,
        ok: bool | None = None,
        note: str = "",
    ) -> None:
        """Write a row."""
        self.outcome.add(Row(self.stage, name, measured, unit, predicted, ok, note))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the stage: an error in it becomes a row, and the stage goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.row(name, "failed", ok=False, note=tail_of(error))
        finally:
            self.release()

    def release(self) -> None:
        """Give back what nobody holds any more."""
        import torch

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def sync(self) -> None:
        """Wait for the device."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call, to its end on the device."""
        self.sync()
        begin = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begin

    def steady_s(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of a few calls after one that is not counted."""
        self.seconds(work)
        return statistics.median(self.seconds(work) for _ in range(1 if self.tiny else rounds))

    def first_and_steady_s(self, call: Callable[..., object], shapes: Sequence[Any]) -> tuple[float, float]:
        """Median seconds of the first call on each new shape, after another one, and of later calls on the last."""
        first = [self.seconds(functools.partial(call, shape)) for shape in shapes]
        return statistics.median(first[1:]), self.steady_s(functools.partial(call, shapes[-1]))

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """Most bytes that the allocator held during a call beyond what it held before; None on a CPU."""
        import torch

        if not self.on_gpu:
            work()
            return None
        self.sync()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.sync()
        return int(torch.cuda.max_memory_allocated()) - before


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread once so many seconds have passed."""

    def over(*_: Any) -> None:
        raise OutOfTime(f"its {seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def tail_of(error: BaseException) -> str:
    """The last lines of an error's traceback."""
    text = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(text[-LINES:])[-2000:]
