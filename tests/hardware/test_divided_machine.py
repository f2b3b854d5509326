"""Parts of a machine for workers: which GPUs or cores each has, and what a process that is started there sees."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.places import Place, divide
from grpo_autotune.trials.parent.recovery import used_gpu_bytes
from grpo_autotune.trials.parent.worker import Worker
from tests.support.nvml import GIB, Card, with_gpus
from tests.support.paper_machine import MACHINE

CARDS = [Card(uuid=f"GPU-{number}", used_bytes=number * GIB) for number in range(8)]
SLICES = "MIG-a,MIG-b,MIG-c"


@pytest.mark.parametrize(
    ("visible", "workers", "processes", "expected"),
    [
        (None, "2", 1, ["0", "1"]),
        (None, "auto", 1, [str(number) for number in range(8)]),
        (None, "auto", 3, ["0,1,2", "3,4,5"]),
        ("6,2,4", "2", 1, ["6", "2"]),
        ("6,2,4,1", "2", 2, ["6,2", "4,1"]),
        ("GPU-5,GPU-1", "auto", 1, ["GPU-5", "GPU-1"]),
        (SLICES, "auto", 1, SLICES.split(",")),
        (None, "1", 1, []),
        ("3", "auto", 1, []),
    ],
)
def test_workers_have_the_gpus_that_the_user_left_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, workers: str, processes: int, expected: list[str]
) -> None:
    cards = [Card(uuid="GPU-0", slices=[Card(uuid=name) for name in SLICES.split(",")])] if visible == SLICES else CARDS
    with_gpus(monkeypatch, *cards, visible=visible)
    places = divide(detect(), workers, processes)
    assert [place.environment(processes, {})["CUDA_VISIBLE_DEVICES"] for place in places] == expected
    assert len({place.name for place in places}) == len(places)
    assert all(place.cores == () and place.share == 1.0 for place in places)


def test_a_place_is_named_as_the_user_names_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, *CARDS, visible="6,2,GPU-1,GPU-3")
    assert [place.name for place in divide(detect(), "4")] == ["GPU 6", "GPU 2", "GPU-1", "GPU-3"]
    assert [place.name for place in divide(detect(), "2", 2)] == ["GPUs 6,2", "GPU-1,GPU-3"]
    assert used_gpu_bytes(("6",)) == 6 * GIB and used_gpu_bytes() == (6 + 2 + 1 + 3) * GIB


def test_cores_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2, 13)))
    machine = MACHINE.model_copy(update={"cores": 11})
    places = divide(machine, "2")
    assert [place.name for place in places] == ["cores 2-6", "cores 7-11"]
    assert [place.share for place in places] == [0.5, 0.5]
    assert divide(machine, "auto") == places and divide(machine, "auto", 2) == ()
    assert [place.name for place in divide(machine, "11")][:2] == ["core 2", "core 3"]


@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [(1, {}, "4"), (1, {"OMP_NUM_THREADS": "16"}, "4"), (1, {"OMP_NUM_THREADS": "1"}, "1"), (2, {}, "1"),
     (2, {"OMP_NUM_THREADS": "16"}, "2"), (1, {"OMP_NUM_THREADS": "0"}, "1")],
)  # fmt: skip
def test_threads_do_not_outnumber_the_cores(processes: int, given: dict[str, str], expected: str) -> None:
    place = Place("cores 0-3", cores=(0, 1, 2, 3))
    assert place.environment(processes, given) == {"OMP_NUM_THREADS": expected}


@pytest.mark.parametrize(
    ("workers", "processes", "line"),
    [
        ("0", 1, "'0' is not a number of workers: Give 1 or more, or auto."),
        ("-1", 1, "'-1' is not a number of workers"),
        ("many", 1, "'many' is not a number of workers"),
        ("5", 1, "5 workers need 5 GPUs, and there are 4: Give at most 4, or auto."),
        ("3", 2, "3 workers of 2 processes each need 6 GPUs, and there are 4: Give at most 2, or auto."),
        ("2", 8, "2 workers of 8 processes each need 16 GPUs, and there are 4: Start fewer processes"),
    ],
)
def test_what_there_is_no_room_for_is_one_line(
    monkeypatch: pytest.MonkeyPatch, workers: str, processes: int, line: str
) -> None:
    with_gpus(monkeypatch, *CARDS, visible="0,1,2,3")
    with pytest.raises(ConfigError) as caught:
        divide(detect(), workers, processes)
    assert caught.value.where == "--workers" and f"{caught.value.what}: {caught.value.fix}".startswith(line)


@pytest.mark.slow
def test_a_workers_process_has_its_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    before = os.sched_getaffinity(0)
    core = max(before)
    with started(tmp_path, Place("core", cores=(core,))) as process:
        assert os.sched_getaffinity(0) == before
        assert process.cpu_affinity() == [core] and process.environ()["OMP_NUM_THREADS"] == "1"
    with started(tmp_path, Place("GPU 3", gpus=("3",))) as process:
        assert set(process.cpu_affinity()) == before and process.environ()["CUDA_VISIBLE_DEVICES"] == "3"


@contextmanager
def started(folder: Path, place: Place) -> Iterator[psutil.Process]:
    """The process of a worker, behind its guardian, once both are there."""
    worker = Worker(folder, folder / "log", 1, place)
    try:
        deadline = time.monotonic() + 30.0
        while not (children := psutil.Process(worker.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        while "child.worker" not in " ".join(children[0].cmdline()) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield children[0]
    finally:
        worker.end()
