"""A driver on paper: NVML's bindings for GPUs that are not there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

GIB = 2**30


class NVMLError(Exception):
    """As the bindings raise it."""


class NotSupported(NVMLError):
    """Of a part that does not report what is asked for."""


@dataclass
class Card:
    """A GPU or a MIG slice; None is what it does not report."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory_bytes: int | None = 80 * GIB
    used_bytes: int = 0
    capability: tuple[int, int] = (9, 0)
    uuid: str = "GPU-0"
    power_w: float | None = 700.0
    node: int | None = None
    slices: list[Card] = field(default_factory=list)
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    busy: list[tuple[int, int]] = field(default_factory=list)
    persistence: bool | None = True
    throttle: int | None = 0
    ecc: bool | None = True
    errors: int = 0
    nvlink: bool = True
    peers: bool = True
    percent: int | None = None
    card: Card | None = None


def _or_not_supported(value: Any) -> Any:
    if value is None:
        raise NotSupported
    return value


class Driver:
    """What `import pynvml` finds."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_FOUND = 6
    NVML_P2P_CAPS_INDEX_READ = (0,)  # as the bindings have it
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0

    def __init__(self, cards: list[Card]) -> None:
        self.cards, self.open = cards, 0
        for card in cards:
            for piece in card.slices:
                piece.card = card

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        parts = [part for card in self.cards for part in (card, *card.slices)]
        return _or_not_supported(next((part for part in parts if part.uuid == uuid), None))

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> SimpleNamespace:
        return SimpleNamespace(total=_or_not_supported(card.memory_bytes), used=card.used_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        return _or_not_supported(None if card.card else card.capability)

    def nvmlDeviceGetEnforcedPowerLimit(self, card: Card) -> int:
        return round(1000 * _or_not_supported(card.power_w))

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> SimpleNamespace:
        return SimpleNamespace(gpu=_or_not_supported(card.percent))

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        raise NotSupported

    def nvmlDeviceGetNumaNodeId(self, card: Card) -> int:
        return _or_not_supported(card.node)

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        return [int(bool(_or_not_supported(None if card.card else card.slices))), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        return _or_not_supported(card.slices[index - 1] if 0 < index <= len(card.slices) else None)  # 0 was destroyed

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: Card) -> Card:
        return _or_not_supported(card.card)

    def nvmlDeviceGetPersistenceMode(self, card: Card) -> int:
        return int(_or_not_supported(card.persistence))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> int:
        return _or_not_supported(card.throttle)

    def nvmlDeviceGetEccMode(self, card: Card) -> list[int]:
        return [int(_or_not_supported(card.ecc)), 1]

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, since: int) -> int:
        assert (kind, since) == (1, 0)
        return _or_not_supported(card.errors if card.ecc else None)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]

    def nvmlDeviceGetProcessUtilization(self, card: Card, since_us: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, smUtil=percent) for pid, percent in card.busy]

    def nvmlDeviceGetP2PStatus(self, one: Card, other: Card, what: int) -> int:
        assert isinstance(what, int)
        return 0 if (one.nvlink and other.nvlink if what == 2 else one.peers and other.peers) else 5


def with_gpus(monkeypatch: pytest.MonkeyPatch, *cards: Card, visible: str | None = None) -> Driver:
    """Put a driver with these GPUs in place of this machine's, all of them visible unless CUDA is told otherwise."""
    driver = Driver(list(cards))
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    for name in ("CUDA_VISIBLE_DEVICES", "GRPO_AUTOTUNE_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return driver
