"""A thread that samples the machine five times per second for the stage under way."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil

from grpo_autotune.hardware.device import handle_of
from grpo_autotune.records.probe import Utilisation

INTERVAL_S = 0.2


@dataclass(slots=True)
class _Sums:
    samples: int = 0
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class NvmlDevice:
    """Utilisation, memory and power of one GPU, or of a MIG slice, through NVML.

    Args:
        device: A CUDA device of this process.

    Raises:
        pynvml.NVMLError: There is no driver, or it does not know the device.
    """

    def __init__(self, device: Any) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = handle_of(pynvml, device)
        if self._handle is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def read(self) -> dict[str, float]:
        """Percent busy, bytes in use, watts; without those that the GPU does not report."""
        nvml, values = self._nvml, {}
        readers: Iterable[tuple[str, Callable[[], float]]] = (
            ("gpu_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            ("gpu_memory_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle).used),
            ("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000.0),
        )
        for name, reader in readers:
            try:
                values[name] = float(reader())
            except nvml.NVMLError:
                continue
        return values


class ProcessReader:
    """CPU use of this process and its children (percent of one core) and its resident bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()

    def read(self) -> dict[str, float]:
        return {"cpu_percent": self._process.cpu_percent(), "rss_bytes": float(self._process.memory_info().rss)}


class Sampler:
    """Samples `readers` until stopped.

    Args:
        stage_now: Name of the stage under way, None to skip the sample.
        readers: What is read at each sample.
        interval_s: Seconds between samples.
    """

    def __init__(
        self, stage_now: Callable[[], str | None], readers: Iterable[Any], interval_s: float = INTERVAL_S
    ) -> None:
        self._stage_now, self._readers, self._interval_s = stage_now, list(readers), interval_s
        self._sums: dict[str, _Sums] = defaultdict(_Sums)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin sampling on a daemon thread; a second call does nothing."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="grpo-autotune-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End sampling; the samples stay."""
        if self._thread is not None:
            self._stop.set()
            if self._thread is not threading.current_thread():  # which may be the one that a probe is forgotten on
                self._thread.join()
            self._thread = None

    def sample(self) -> None:
        """Take one sample now."""
        stage = self._stage_now()
        values = {name: value for reader in self._readers for name, value in reader.read().items()}
        if stage is None:
            return
        sums = self._sums[stage]
        sums.samples += 1
        for name, value in values.items():
            sums.totals[name] += value

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()

    def summary(self) -> list[Utilisation]:
        """Means by stage."""
        rows = []
        for stage, sums in list(self._sums.items()):
            mean = {name: total / sums.samples for name, total in sums.totals.items()}
            counts = {name: round(mean.pop(name)) for name in ("rss_bytes", "gpu_memory_bytes") if name in mean}
            rows.append(Utilisation.model_validate({"stage": stage, "samples": sums.samples, **mean, **counts}))
        return rows
