"""A thread that samples the machine five times per second for the stage under way, and what others take of it."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from grpo_autotune.hardware.device import handle_of
from grpo_autotune.records.probe import OtherLoad, Utilisation

Look = tuple[float, float]
INTERVAL_S = 0.2
MUCH, MUCH_BESIDE_GPU = 0.1, 0.5
"""Shares of the cores, or half a core, from which others' work makes steps longer; beside a GPU only the larger one, or
as much of the GPU's time as the smaller one."""


@dataclass(slots=True)
class _Sums:
    samples: int = 0
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class NvmlDevice:
    """Utilisation, memory and power of one GPU, or of a MIG slice, through NVML; a `pynvml.NVMLError` where there is no
    driver, or it does not know the device."""

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
            ("other_gpu_percent", self._by_others),
        )
        for name, reader in readers:
            with suppress(nvml.NVMLError):
                values[name] = float(reader())
        return values

    def _by_others(self) -> float:
        """Percent of the GPU that other processes used last; a container, whose numbers of processes are its own,
        cannot tell."""
        nvml, me = self._nvml, os.getpid()
        if me not in {row.pid for row in nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)
        rows = nvml.nvmlDeviceGetProcessUtilization(self._handle, int((time.time() - 1.0) * 1e6))
        newest = {row.pid: row.smUtil for row in rows if row.smUtil and row.pid != me}
        return float(sum(newest[pid] for pid in newest.keys() - (_own_pids() if newest else set())))


class ProcessReader:
    """CPU use of this process since the last reading (percent of one core) and its resident bytes."""

    def __init__(self, resident: Callable[[], int] | None = None) -> None:
        process = psutil.Process()
        self._resident = resident or (lambda: process.memory_info().rss)
        self._looked = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        (then_s, before_s), self._looked = self._looked, (time.perf_counter(), time.process_time())
        percent = 100.0 * (self._looked[1] - before_s) / (self._looked[0] - then_s)
        return {"cpu_percent": round(percent, 1), "rss_bytes": float(self._resident())}


def readers_for(device: Any, gauge: Any = None) -> list[Any]:
    """Readers of this process, by the `gauge` of a probe on the CPU, and of its GPU where a driver knows one."""
    readers: list[Any] = [ProcessReader(gauge if device.type == "cpu" else None)]
    if device.type == "cuda":
        import pynvml

        with suppress(pynvml.NVMLError):
            readers.append(NvmlDevice(device))
    return readers


def _own_pids() -> set[int]:
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def _open_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    told = getattr(os, "sched_getaffinity", None)
    return set(told(0)) if told is not None else set(range(psutil.cpu_count() or 1))


def others_s(ranks: int) -> Look:
    """The clock, and seconds in which the cores open to this process were busy with other work than its own and its
    children's; its sibling ranks are taken to work as much."""
    busy, mine, open_cores = 0.0, 0.0, _open_cores()
    for number, core in enumerate(psutil.cpu_times(percpu=True)):
        if number in open_cores:  # a guest's time is in the user's as well
            idle = (getattr(core, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
            busy += sum(core) - sum(idle)
    for pid in _own_pids():
        with suppress(psutil.NoSuchProcess):
            mine += sum(psutil.Process(pid).cpu_times()[:4])  # with those of children that ended
    return time.monotonic(), busy - ranks * mine


def load_between(first: Look, last: Look, gpu_percent: float | None, *, on_gpu: bool) -> OtherLoad | None:
    """Load by other processes between two looks of `others_s`; None where the system counts no work."""
    cores, of = (last[1] - first[1]) / (last[0] - first[0]), len(_open_cores())
    much = MUCH_BESIDE_GPU * of if on_gpu else min(0.5, MUCH * of)
    matters = cores >= much or (gpu_percent or 0.0) >= 100.0 * MUCH
    load = OtherLoad(cores=max(0.0, cores), of=of, gpu_percent=gpu_percent, matters=matters)
    return load if cores > -MUCH else None


class Sampler:
    """Samples `readers` until stopped, for the stage that `stage_now` names (None: not now); `keep` is given each."""

    def __init__(
        self,
        stage_now: Callable[[], str | None],
        readers: Iterable[Any],
        interval_s: float = INTERVAL_S,
        ranks: int = 1,
        keep: Callable[[dict[str, float]], None] = lambda values: None,
    ) -> None:
        self._stage_now, self._readers, self._interval_s = stage_now, list(readers), interval_s
        self._keep, self._ranks, self._looks = keep, ranks, list[Look]()
        self._sums: dict[str, _Sums] = defaultdict(_Sums)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin sampling on a daemon thread; a second call does nothing."""
        if self._thread is None:
            self._looks = self._looks[:1] or [others_s(self._ranks)]
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
            self._looks.append(others_s(self._ranks))

    def sample(self) -> None:
        stage = self._stage_now()
        values = {name: value for reader in self._readers for name, value in reader.read().items()}
        if stage is None:
            return
        self._keep(values)
        sums = self._sums[stage]
        sums.samples += 1
        for name, value in values.items():
            sums.totals[name] += value

    def others(self, *, on_gpu: bool) -> OtherLoad | None:
        """Load by other processes from the start to the end, or until now; None where the system counts no work."""
        looks = [*self._looks, others_s(self._ranks)] if self._thread is not None else self._looks
        if len(looks) < 2 or looks[-1][0] <= looks[0][0]:
            return None
        seen = [(u.samples, u.other_gpu_percent) for u in self.summary() if u.other_gpu_percent is not None]
        gpu = sum(n * percent for n, percent in seen) / sum(n for n, _ in seen) if seen else None
        return load_between(looks[0], looks[-1], gpu, on_gpu=on_gpu)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()

    def summary(self) -> list[Utilisation]:
        rows = []
        for stage, sums in list(self._sums.items()):
            mean = {name: total / sums.samples for name, total in sums.totals.items()}
            counts = {name: round(mean.pop(name)) for name in ("rss_bytes", "gpu_memory_bytes") if name in mean}
            rows.append(Utilisation.model_validate({"stage": stage, "samples": sums.samples, **mean, **counts}))
        return rows
