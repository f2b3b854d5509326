"""Parts of this machine for workers that measure beside each other: a GPU or a group of them each, else a few cores."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.machine import Machine
from grpo_autotune.hardware.nvml import VISIBLE, names_of_gpus
from grpo_autotune.units import plural

LEAST_CORES = 4
"""Cores for each process of a worker under `auto`: what is fastest on fewer may not be on the whole machine."""
THREADS = "OMP_NUM_THREADS"


class Place(NamedTuple):
    """A part of this machine that the trials of one worker are pinned to."""

    name: str  # such as `GPU 1`, or `cores 0-3`
    gpus: tuple[str, ...] = ()  # as `CUDA_VISIBLE_DEVICES` names them
    cores: tuple[int, ...] = ()  # none where GPUs compute: then all workers use all cores
    share: float = 1.0  # of the cores and the memory of a trial that runs alone

    def environment(self, processes: int, given: Mapping[str, str]) -> dict[str, str]:
        """Variables for so many processes of a trial, where a user's own are `given`: no more threads than cores, and
        where nobody says, one for each of several processes, as `torchrun` has it."""
        if self.gpus:
            return {VISIBLE: ",".join(self.gpus)}
        most, told = max(1, len(self.cores) // processes), given.get(THREADS, "")
        wanted = int(told) if told.isdecimal() else most if processes == 1 else 1
        return {THREADS: str(max(1, min(most, wanted)))}

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Start processes on these cores meanwhile: a child takes the affinity of the thread that starts it."""
        if not self.cores or not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def divide(machine: Machine, workers: str, processes: int = 1) -> tuple[Place, ...]:
    """The places of so many workers (`auto`: as many as there is room for), whose trials have `processes` each: in
    order, of the GPUs that CUDA shows this process, else of its cores. None for one worker, which has the machine as it
    is. ConfigError for what is no number of workers, and for more than there is room for."""
    names = names_of_gpus(len(machine.gpus))
    unit, count_here = ("GPU", len(names)) if names else ("core", machine.cores)
    most, fitting = count_here // processes, count_here // (processes if names else processes * LEAST_CORES)
    count = max(1, fitting) if workers == "auto" else int(workers) if workers.isdecimal() else 0
    if count < 1:
        what, fix = f"{workers!r} is not a number of workers", "Give 1 or more, or auto."
        raise ConfigError(what, where="--workers", fix=fix)
    if count == 1:
        return ()
    if count > most:
        each = "" if processes == 1 else f" of {processes} processes each"
        what = f"{count} workers{each} need {plural(count * processes, unit)}, and there are {count_here}"
        fix = f"Give at most {most}, or auto." if most else f"Start fewer processes (WORLD_SIZE is {processes})."
        raise ConfigError(what, where="--workers", fix=fix)
    if names:
        groups = (names[at : at + processes] for at in range(0, count * processes, processes))
        return tuple(Place(_gpus_name(group), gpus=tuple(group)) for group in groups)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(count_here))
    each_has = count_here // count
    parts = (cores[at : at + each_has] for at in range(0, count * each_has, each_has))
    return tuple(Place(_cores_name(part), cores=tuple(part), share=1.0 / count) for part in parts)


def _gpus_name(names: list[str]) -> str:
    text = ",".join(names)
    return text if not names[0].isdecimal() else f"GPU{'' if len(names) == 1 else 's'} {text}"


def _cores_name(cores: list[int]) -> str:
    return f"core {cores[0]}" if len(cores) == 1 else f"cores {cores[0]}-{cores[-1]}"
