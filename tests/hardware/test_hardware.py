"""The machine's facts, the table of GPUs, and ceilings under a clock that the test drives."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune import files, hardware
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware import ceilings, machine
from grpo_autotune.hardware.gpus import GPUS, find_gpu


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GRPO_AUTOTUNE_CACHE")
    assert files.cache_dir() == tmp_path / "xdg" / "grpo-autotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "grpo-autotune"
    assert files.cache_dir().is_dir()


def test_machine_survives_json_and_its_fingerprint_is_stable() -> None:
    found = hardware.detect()
    assert hardware.Machine.model_validate_json(found.model_dump_json()) == found
    assert hardware.detect().fingerprint == found.fingerprint
    assert found.cores >= 1 and found.memory_bytes > 2**28
    assert found.versions["trl"].startswith("1.16.")


def test_container_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    free = machine.usable_memory_bytes()
    assert machine.usable_cores() == 8
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert (machine.usable_cores(), machine.usable_memory_bytes()) == (2, 2**30)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (machine.usable_cores(), machine.usable_memory_bytes()) == (8, free)


@pytest.mark.parametrize(
    ("reported", "row"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 5090", "GeForce RTX 5090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GB300", "GB300"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GB10", "GB10"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", None),
        ("NVIDIA H800", "H800 SXM"),
        ("NVIDIA H800 PCIe", "H800 PCIe"),
        ("NVIDIA A800-SXM4-80GB", "A800 80GB SXM"),
        ("NVIDIA A800 40GB Active", "A800 40GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_cards_are_found_by_the_name_their_driver_reports(reported: str, row: str | None) -> None:
    found = find_gpu(reported)
    assert (found.name if found else None) == row


def test_rows_are_plausible_and_have_a_vendors_source() -> None:
    assert len({row.name for row in GPUS}) == len(GPUS)
    vendors = (
        "https://www.nvidia.com/",
        "https://images.nvidia.com/",
        "https://www.amd.com/",
        "https://d1.awsstatic.com/",
    )
    for row in GPUS:
        assert row.source.startswith(vendors) or row.name == "H20"
        assert 50e12 < row.matrix_flops_s < 3e15 and 2e11 < row.bandwidth_bytes_s < 1e13
        assert 30 < row.matrix_flops_s / row.bandwidth_bytes_s < 500


def ticking(step_s: float) -> Any:
    """A clock that moves on by `step_s` each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * step_s


def test_rates_follow_from_the_clock() -> None:
    found = ceilings.matrix_rate("cpu", "float32", ticking(0.25), ticking(3.0))
    assert (found.side, found.flops_s) == (256, 2 * 256**3 / 0.25)
    assert found.cores == pytest.approx(3.0 / (0.25 * 9))
    assert ceilings.copy_rate("cpu", 1000, ticking(0.25)) == 8000.0


@pytest.mark.long
def test_sides_grow_while_products_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "LARGEST_SIDE", 512)
    found = ceilings.matrix_rate("cpu", "bfloat16", ticking(0.005), ticking(1.0))
    assert (found.side, found.flops_s) == (512, pytest.approx(2 * 512**3 / 0.005))


def test_a_full_device_gets_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceilings.free_bytes("cpu") > 0
    monkeypatch.setattr(ceilings, "free_bytes", lambda _: 64 * 300**2)
    assert ceilings.matrix_rate("cpu", "float32", ticking(0.005), ticking(1.0)).side == 256


def measure(tick_s: float, dtype: str = "float32", cpu_s: float = 1e9, fresh: bool = False) -> hardware.Ceilings:
    clocks = {"clock": ticking(tick_s), "cpu_clock": ticking(cpu_s)}
    return hardware.measure_ceilings("cpu", dtype, fresh=fresh, **clocks)


def test_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    first = measure(0.25)
    assert measure(99.0) == first
    assert measure(0.125, "bfloat16") != first
    assert measure(0.5, fresh=True).memory_bytes_s == 4000.0
    assert len(list((cache / "ceilings").iterdir())) == 2


def test_a_busy_machine_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    busy = measure(0.25, cpu_s=0.1)
    assert not busy.quiet and not any((cache / "ceilings").iterdir())
    quiet = measure(0.125)
    assert quiet.quiet and quiet.memory_bytes_s == 2 * busy.memory_bytes_s


def test_a_torn_file_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    whole = measure(0.25)
    (path,) = (cache / "ceilings").iterdir()
    path.write_text(path.read_text()[:20])
    assert measure(0.5).memory_bytes_s == whole.memory_bytes_s / 2
    assert json.loads(path.read_text())["device"] == "cpu"


@pytest.mark.parametrize(("free", "files"), [(16 * 2**30, 1), (2 * 2**30, 0)])
def test_a_gpu_without_room_is_measured_and_not_kept(
    free: int, files: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "free_bytes", lambda device: free)
    monkeypatch.setattr(ceilings, "runtime_facts", lambda device: {"driver": "580.65", "power_limit": "700 W"})
    monkeypatch.setattr(ceilings, "matrix_rate", lambda *args: ceilings.Products(4096, 1e14, 1.0))
    monkeypatch.setattr(ceilings, "copy_rate", lambda *args: 1e12)
    assert hardware.measure_ceilings("cuda", "bfloat16").matrix_flops_s == 1e14
    assert len(list((cache / "ceilings").iterdir())) == files


def test_what_decides_a_gpus_rates_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    facts = {"gpu": "NVIDIA H100 PCIe", "driver": "580.65", "power_limit": "350 W"}
    monkeypatch.setattr(ceilings, "runtime_facts", lambda device: facts)
    plain = ceilings._settings("cuda", "bfloat16")
    assert plain == "cuda-NVIDIA_H100_PCIe_580.65_350_W_-"
    facts["power_limit"] = "300 W"
    assert ceilings._settings("cuda", "bfloat16") != plain
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert "_high-" in ceilings._settings("cuda", "float32") and ceilings._settings("cpu", "float32") == "cpu-"


def test_without_a_cache_a_probe_still_has_its_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentProblem, match=r"the cache folder cannot be made .* Point GRPO_AUTOTUNE_CACHE"):
        files.cache_dir()
    assert measure(0.25).matrix_side == 256
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "write_whole", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    assert measure(0.25).matrix_side == 256


def test_this_machine_is_measured_in_seconds(cache: Path) -> None:
    found = hardware.measure_ceilings("cpu", "float32")
    assert found.measured_s < 10.0
    assert found.matrix_flops_s > 1e9 and found.memory_bytes_s > 1e8
    assert found.threads >= 1 and found.matrix_side >= 256
