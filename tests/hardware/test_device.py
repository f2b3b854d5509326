"""Memory of the device that a run is on, from a driver and a torch on paper, and the budgets that follow from it."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from grpo_autotune.hardware.ceilings import free_bytes
from grpo_autotune.hardware.device import room_of, runtime_facts
from grpo_autotune.hardware.device_memory import ALLOCATOR
from grpo_autotune.knobs import engine
from grpo_autotune.knobs.context import context_of, gpu_bytes
from grpo_autotune.predict.room import memory_of
from grpo_autotune.probe.sampler import NvmlDevice
from tests.support.nvml import GIB, Card, with_gpus
from tests.support.sample_records import GPU_MACHINE, config_of, trainer_facts, vllm_record

CUDA = torch.device("cuda", 1)


def on_cuda(monkeypatch: pytest.MonkeyPatch, free: int, total: int, reserved: int = 0, integrated: int = 0) -> None:
    answers: dict[str, Any] = {
        "mem_get_info": lambda device: (free, total) if device == CUDA else (0, 0),
        "memory_reserved": lambda device: reserved,
        "get_device_properties": lambda device: SimpleNamespace(is_integrated=integrated),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_what_others_hold_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_of(torch.device("cpu")) is None
    on_cuda(monkeypatch, free=20 * GIB, total=80 * GIB, reserved=10 * GIB)
    assert room_of(CUDA) == (80 * GIB, 30 * GIB)


def test_what_a_sleeping_engine_gave_back_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, free=50 * GIB, total=80 * GIB, reserved=45 * GIB)
    rows = {
        0: SimpleNamespace(handle=(0, 40 * GIB), is_asleep=True),
        1: SimpleNamespace(handle=(0, 5), is_asleep=False),
    }
    cumem = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=SimpleNamespace(pointer_to_data=rows)))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
    assert room_of(CUDA) == (80 * GIB, 55 * GIB)
    cumem.CuMemAllocator.instance = None
    assert room_of(CUDA) == (80 * GIB, 80 * GIB)


def test_unified_memory_counts_the_kernels_caches_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, free=2 * GIB, total=120 * GIB, integrated=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=90 * GIB))
    assert room_of(CUDA) == (120 * GIB, 90 * GIB)
    assert free_bytes(str(CUDA)) == 90 * GIB, "so that ceilings are those of the whole device"


def test_budgets_are_of_the_device_that_the_probe_ran_on() -> None:
    on_gpu = trainer_facts(device="cuda")
    assert memory_of(GPU_MACHINE, on_gpu) == gpu_bytes(GPU_MACHINE, on_gpu) == 80 * GIB
    shared = trainer_facts(device="cuda", device_bytes=24 * GIB, device_room_bytes=9 * GIB)
    assert (memory_of(GPU_MACHINE, shared), gpu_bytes(GPU_MACHINE, shared)) == (9 * GIB, 24 * GIB)
    record = vllm_record()
    config = config_of(record, vllm={"gpu_memory_utilization": 0.5})
    for seen_bytes, share in ((None, 40 * GIB), (24 * GIB, 12 * GIB)):
        trainer = record.trainer.model_copy(update={"device_bytes": seen_bytes})
        seen = record.model_copy(update={"trainer": trainer})
        assert engine.share_bytes(context_of(config, GPU_MACHINE, seen)) == share


def at(uuid: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device whose GPU torch knows by this UUID."""
    answer = SimpleNamespace(uuid=uuid, is_integrated=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: answer)
    return CUDA


def test_samples_come_from_the_devices_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = Card(name="H200 MIG 1g.18gb", uuid="MIG-7", used_bytes=7)
    driver = with_gpus(monkeypatch, Card(uuid="GPU-5", used_bytes=5), Card(uuid="GPU-6", slices=[piece]))
    assert NvmlDevice(at("7", monkeypatch)).read() == {"gpu_memory_bytes": 7.0}, "a slice reports no utilisation"
    assert NvmlDevice(at("5", monkeypatch)).read() == {"gpu_memory_bytes": 5.0}
    with pytest.raises(driver.NVMLError):
        NvmlDevice(at("8", monkeypatch))


def test_a_gpu_tells_what_others_take_of_it_where_it_knows_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getpid()
    busy = [(me, 60), (1, 10), (1, 30), (2, 5)]  # the newest sample of a process is the last
    with_gpus(monkeypatch, Card(uuid="GPU-5", processes=[(me, 1), (1, 1)], busy=busy))
    assert NvmlDevice(at("5", monkeypatch)).read()["other_gpu_percent"] == 35.0
    with_gpus(monkeypatch, Card(uuid="GPU-5", processes=[(1, 1)], busy=busy))
    assert "other_gpu_percent" not in NvmlDevice(at("5", monkeypatch)).read()


def test_what_makes_a_gpu_fast_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_facts(torch.device("cpu")) == {"threads": str(torch.get_num_threads())}
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    with_gpus(monkeypatch, Card(uuid="GPU-5"), Card(uuid="GPU-6", power_w=350.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch._C, "_get_sdp_priority_order", lambda: [3, 1, 2, 0, 4])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr("grpo_autotune.hardware.device.package_version", lambda name: None)
    device = at("6", monkeypatch)
    facts = {"gpu": "NVIDIA H100", "cuda": "13.0", "cudnn": "91500", "nccl": "2.28.3", "driver": "580.65.06"}
    facts |= {"sdpa": "cudnn, flash, mem_efficient, math", "allocator": "default", "power_limit": "350 W", "ecc": "on"}
    assert runtime_facts(device) == facts
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert runtime_facts(device) == facts | {
        "sdpa": "flash, mem_efficient, math",
        "allocator": "expandable_segments:True",
    }
