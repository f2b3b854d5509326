"""The GPUs that a run uses, with a driver on paper: which are visible, what each reports, and whose memory it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_autotune import hardware
from grpo_autotune.hardware import machine, nvml
from grpo_autotune.knobs.context import KnobContext
from grpo_autotune.knobs.rules import kernel_rule
from tests.support.nvml import GIB, Card, with_gpus
from tests.support.sample_records import config_of, demo_record

SMALL = Card(name="NVIDIA L4", memory_bytes=24 * GIB, capability=(8, 9), uuid="GPU-aaaa-1", power_w=72.0)
LARGE = Card(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), uuid="GPU-abbb-2")


def names() -> list[str]:
    return [gpu.name for gpu in hardware.detect().gpus]


def test_all_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    without = hardware.detect()
    driver = with_gpus(monkeypatch, SMALL, LARGE)
    found = hardware.detect()
    assert found.gpus[1] == hardware.Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB, capability="8.0")
    assert names() == ["NVIDIA L4", "NVIDIA A100-SXM4-80GB"] and found.driver == "580.65.06"
    assert found.fingerprint != without.fingerprint and driver.open == 0


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("1", ["A100"]),
        ("1, 0", ["A100", "L4"]),
        ("GPU-ab", ["A100"]),
        ("GPU-a", []),
        ("", []),
        ("-1,0", []),
        ("0,5,1", ["L4"]),
        ("MIG-none,0", []),
    ],
)
def test_the_visible_ones_in_the_order_cuda_is_told(
    visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, SMALL, LARGE, visible=visible)
    assert [name.replace("NVIDIA ", "").partition("-")[0] for name in names()] == seen


@pytest.mark.parametrize("visible", [None, "0", "MIG-7"])
def test_a_slice_of_a_gpu_is_as_large_as_the_slice(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = Card(name="NVIDIA H200 MIG 1g.18gb", memory_bytes=16 * GIB, uuid="MIG-7", power_w=None)
    with_gpus(monkeypatch, Card(name="NVIDIA H200", memory_bytes=141 * GIB, slices=[piece]), visible=visible)
    (found,) = hardware.detect().gpus
    assert (found.memory_bytes, found.capability) == (16 * GIB, "9.0")
    assert hardware.find_gpu(found.name) is None


def test_unified_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, Card(name="NVIDIA GB10", memory_bytes=None, capability=(12, 1), power_w=None))
    found = hardware.detect()
    assert found.gpus[0].unified and found.gpus[0].memory_bytes == found.memory_bytes
    assert found.gpus[0].capability == "12.1"


def test_memory_that_is_a_gpus_is_not_the_hosts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = machine.usable_memory_bytes()
    for node, cores in (("node0", "0-71"), ("node1", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(f"{cores}\n")
        (tmp_path / node / "meminfo").write_text("Node 1 MemTotal:       1024 kB\nNode 1 MemFree: 1 kB\n")
    monkeypatch.setattr(nvml, "NODES", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "none")
    with_gpus(monkeypatch, Card(name="NVIDIA GH200 480GB", node=1), Card(node=1), Card(node=0), Card(node=9))
    assert hardware.detect().memory_bytes == plain - 1024**2


def test_a_gpu_that_is_not_visible_decides_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_autotune.knobs.rules.installed", lambda package: True)
    old = Card(name="Tesla T4", capability=(7, 5))
    config = config_of(demo_record(), model={"name_or_path": "m", "dtype": "bfloat16"})
    for visible, refused in (("1", False), (None, True)):
        with_gpus(monkeypatch, old, LARGE, visible=visible)
        told = kernel_rule(KnobContext(config, hardware.detect(), {}), "flash_attention_2")
        assert (told is not None) == refused


def test_a_fingerprint_outlives_a_reboot_and_a_server_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, LARGE, LARGE)
    both = hardware.detect()
    assert machine.fingerprint("c", 8, 128 * GIB, both.gpus) == machine.fingerprint("c", 8, 125 * GIB, both.gpus[:1])
    assert machine.fingerprint("c", 8, 128 * GIB, ()) != machine.fingerprint("c", 8, 64 * GIB, ())
    assert machine.fingerprint("c", 8, 128 * GIB, both.gpus) != machine.fingerprint("c", 8, 128 * GIB, ())
