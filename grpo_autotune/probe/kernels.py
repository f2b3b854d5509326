"""Kernels of one optimizer step: the GPU's own timeline, each kernel counted for the stage that launched it.

NVML calls a GPU busy where any kernel ran in its window, which is always so in training. Here a stage's busy seconds
are those in which a kernel ran, so that what is left is the time in which the GPU waited for the host.
"""

import math
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from grpo_autotune.probe.spans import Span, StepSpans
from grpo_autotune.probe.stages import Interval, classify, intersection, length, union
from grpo_autotune.records.probe import STAGES, KernelTime, StageKernels

TOP = 15
PASSES = 64
"""Passes of the model after which the profile of a generation pauses: thousands of kernels a token add up, and one
token is like another."""

NOT_WORK = frozenset({"gpu_user_annotation", "overhead"})
"""Kinds of entries on the device's timeline that are no work."""


class Activity(NamedTuple):
    """An entry of the profiler: work on the device, or the host's call that launched it, which has its
    `correlation`."""

    name: str
    start_s: float  # on the clock `time.time`
    seconds: float
    correlation: int
    on_device: bool


class KernelProfile:
    """The profiler of one step; it records device work and launches alone."""

    def __init__(self, model: torch.nn.Module, generating: Callable[[], bool]) -> None:
        self.passes = 0  # of the model while it is `generating`
        self.paused: list[Interval] = []  # of `time.perf_counter`, in which nothing was recorded
        self._generating = generating
        self._since: float | None = None
        self._offset_s = time.time() - time.perf_counter()
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.start()
        self._hook = model.register_forward_pre_hook(self._pass)  # last: another profiler may be at work

    def stop(self) -> list[Activity]:
        """End the profile; its entries, on the clock of spans (`time.perf_counter`)."""
        self._hook.remove()
        self._resume()
        torch.cuda.synchronize()
        self._profiler.stop()
        entries = activities(self._profiler)
        return [entry._replace(start_s=entry.start_s - self._offset_s) for entry in entries]

    def _pass(self, *_: Any) -> None:
        if not self._generating():
            self._resume()
        else:
            self.passes += 1
            if self.passes > PASSES and self._since is None and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
                self._toggle(False)
                self._since = time.perf_counter()

    def _resume(self) -> None:
        if self._since is not None:
            torch.cuda.synchronize()
            self._toggle(True)
            self.paused.append((self._since, time.perf_counter()))
            self._since = None

    def _toggle(self, on: bool) -> None:
        self._profiler.toggle_collection_dynamic(on, [torch.profiler.ProfilerActivity.CUDA])


def activities(profiler: Any) -> list[Activity]:
    """Entries of a `torch.profiler.profile` that has stopped: work of the device, and the host's calls."""
    on_host = torch._C._autograd.DeviceType.CPU
    return [
        Activity(
            event.name(),
            event.start_ns() / 1e9,
            event.duration_ns() / 1e9,
            event.correlation_id(),
            event.device_type() != on_host,
        )
        for event in profiler.profiler.kineto_results.events()
        if getattr(event, "activity_type", str)() not in NOT_WORK  # torch 2.8 does not tell
    ]


def busy(work: Iterable[Activity]) -> float:
    """Seconds in which at least one of these ran."""
    return length(union((entry.start_s, entry.start_s + entry.seconds) for entry in work))


def longest(work: Iterable[Activity]) -> list[KernelTime]:
    """The kernels that took most time together, by name."""
    count: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for entry in work:
        count[entry.name] += 1
        seconds[entry.name] += entry.seconds
    ranked = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    return [KernelTime(name=name, count=count[name], seconds=seconds[name]) for name in ranked]


def kernels_by_stage(
    step: StepSpans, entries: Sequence[Activity], seconds: dict[str, float], paused: Sequence[Interval] = ()
) -> list[StageKernels]:
    """Count each kernel for the stage in which the host launched it; empty where no work of the device was recorded.
    `entries` are on the clock of the spans. In `paused` intervals nothing was recorded; the device idled at both ends
    of each, so that the host's clock tells what is missing from a stage."""
    times, names = _timeline(step.spans)
    launched = {entry.correlation: entry.start_s for entry in entries if not entry.on_device}
    work: defaultdict[str, list[Activity]] = defaultdict(list)
    for entry in entries:
        if entry.on_device:
            at = launched.get(entry.correlation, entry.start_s)
            work[names[max(0, bisect_right(times, at) - 1)]].append(entry)
    if not work:
        return []
    missing = _missing(times, names, paused)
    return [
        StageKernels(
            stage=stage,
            seconds=max(0.0, seconds.get(stage, 0.0) - missing.get(stage, 0.0)),
            busy_s=busy(work[stage]),
            kernels=len(work[stage]),
            launches=len({entry.correlation for entry in work[stage]}),
            top=longest(work[stage]),
        )
        for stage in STAGES
        if work[stage] or seconds.get(stage, 0.0) > 0.0
    ]


def _timeline(spans: Sequence[Span]) -> tuple[list[float], list[str]]:
    """Moments at which the innermost stage of the main thread changes, and the stage from each on."""
    stages = [stage for stage, _ in classify(spans)]
    edges = [(span.start_s, 1, number) for number, span in enumerate(spans)]
    edges += [(span.start_s + span.host_s, 0, -number) for number, span in enumerate(spans)]  # the inner one ends first
    times, names = [], []
    for at, begins, number in sorted(edges):
        parent = spans[abs(number)].parent
        times.append(at)
        names.append(stages[number] if begins else stages[parent] if parent >= 0 else "other")
    return times, names


def _missing(times: Sequence[float], names: Sequence[str], paused: Sequence[Interval]) -> dict[str, float]:
    """Seconds of each stage that were not recorded."""
    missing: defaultdict[str, float] = defaultdict(float)
    for begin, end, name in zip(times, [*times[1:], math.inf], names, strict=True):
        missing[name] += length(intersection([(begin, end)], paused))
    return missing
