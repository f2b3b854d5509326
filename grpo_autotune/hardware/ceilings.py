"""The rates that this machine reaches: matrix products in the run's dtype, and memory bandwidth; measured once, kept.

A stage's share of its limit refers to these, not to a data sheet. Measuring takes about two seconds. On a machine whose
cores were busy with something else, and on a GPU too full for products and copies that reach its limits, the result is
used, but not kept. Nor is it where the cache folder cannot be written.
"""

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import cache_dir, write_whole
from grpo_autotune.hardware.device import room_of, runtime_facts
from grpo_autotune.hardware.device_memory import DEVICE_MEMORY
from grpo_autotune.hardware.machine import detect, package_version

MATRIX_BUDGET_S = 1.2
COPY_BUDGET_S = 0.6
LONGEST_PRODUCT_S = 0.3
QUIET_SHARE = 0.75
"""Share of its threads' time that the process must have got for the processor to count as quiet."""

SMALLEST_SIDE, LARGEST_SIDE = 256, 16384
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Size of the copy, far larger than the caches, so that it reaches memory."""

LEAST_KEPT_SIDE, LEAST_KEPT_COPY = 8192, 512 * 2**20
"""Of a GPU: smaller products are slower than its limit, and smaller copies may stay within its cache."""


class Ceilings(BaseModel):
    """Measured limits of one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str  # "cpu" or "cuda"
    dtype: str  # name of the matrices' dtype
    threads: int  # threads torch used (1 on a GPU)
    matrix_flops_s: float  # best rate of a square matrix product, operations per second
    memory_bytes_s: float  # best rate of a large copy, bytes read and written per second
    matrix_side: int  # side of the product that reached the best rate
    measured_s: float  # seconds the measurement took
    quiet: bool = True  # whether the process had its threads' cores to itself (true on a GPU, where that is not known)


def measure_ceilings(
    device: str,
    dtype: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
    fresh: bool = False,
) -> Ceilings:
    """This machine's ceilings for a device as torch names it ("cpu", "cuda:1") and "float32", "bfloat16" or "float16":
    from its cache file, or measured where that cannot be read or they are to be `fresh`. `cpu_clock` gives seconds of
    processor time that this process has used, over all threads."""
    import torch

    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    threads = torch.get_num_threads() if kind == "cpu" else 1
    path = _path(f"{detect().fingerprint}-{_settings(device, dtype)}{dtype}-{threads}-torch{package_version('torch')}")
    if path is not None and not fresh:
        with suppress(OSError, ValidationError):
            return Ceilings.model_validate_json(path.read_bytes())
    start, copied = clock(), min(COPY_BYTES[kind], free_bytes(device) // 8)
    had_room = kind == "cpu" or (largest_side(device) >= LEAST_KEPT_SIDE and copied >= LEAST_KEPT_COPY)
    products = matrix_rate(device, dtype, clock, cpu_clock)
    measured = Ceilings(
        device=kind,
        dtype=dtype,
        threads=threads,
        matrix_flops_s=products.flops_s,
        memory_bytes_s=copy_rate(device, copied, clock),
        matrix_side=products.side,
        quiet=kind != "cpu" or products.cores >= QUIET_SHARE * threads,
        measured_s=clock() - start,
    )
    if path is not None and measured.quiet and had_room:
        with suppress(OSError):
            write_whole(path, measured.model_dump_json(indent=2))
    return measured


def _path(key: str) -> Path | None:
    """Cache file of a key; None where there is no cache."""
    try:
        return cache_dir("ceilings") / f"{key}.json"
    except EnvironmentProblem:
        return None


def _settings(device: str, dtype: str) -> str:
    """The device and what besides the hardware decides its rates, as the beginning of a key."""
    import torch

    if torch.device(device).type == "cpu":
        return "cpu-"
    facts = runtime_facts(torch.device(device))
    told = [facts.get(name, "") for name in ("gpu", "driver", "power_limit")]
    tf32 = torch.get_float32_matmul_precision() if dtype == "float32" else ""
    return f"cuda-{re.sub(r'[^A-Za-z0-9.]+', '_', ' '.join([*told, tf32]))}-"


class Products(NamedTuple):
    """Fastest square product: its side, its rate, and the cores the process had while products ran."""

    side: int
    flops_s: float
    cores: float


def matrix_rate(device: str, dtype: str, clock: Callable[[], float], cpu_clock: Callable[[], float]) -> Products:
    """Measure the fastest square product; sides double while one product stays within `LONGEST_PRODUCT_S`."""
    import torch

    random = torch.Generator(device)  # a run may be under way: its own stream of random numbers stays untouched
    side, best_side, best = SMALLEST_SIDE, SMALLEST_SIDE, 0.0
    largest = largest_side(device)
    wall_s = cpu_s = 0.0
    while True:
        draws = (torch.randn(side, side, device=device, generator=random) for _ in range(2))
        left, right = (draw.to(getattr(torch, dtype)) for draw in draws)
        product = partial(torch.mm, left, right, out=torch.empty_like(left))
        started, cpu_started = clock(), cpu_clock()
        seconds = _shortest(product, device, clock, MATRIX_BUDGET_S / 8)
        wall_s, cpu_s = wall_s + clock() - started, cpu_s + cpu_clock() - cpu_started
        rate = 2 * side**3 / seconds
        if rate > best:
            best_side, best = side, rate
        if 8 * seconds > LONGEST_PRODUCT_S or 2 * side > largest or wall_s > MATRIX_BUDGET_S:
            return Products(best_side, best, cpu_s / wall_s)
        side *= 2


def largest_side(device: str) -> int:
    """Side of the largest square product that is tried: a device that is nearly full has room for small ones alone."""
    return min(LARGEST_SIDE, math.isqrt(free_bytes(device) // 64))


def free_bytes(device: str) -> int:
    """Bytes that can be allocated on the device now; a run may hold most of its memory."""
    import torch

    if (room := room_of(torch.device(device))) is not None:
        return room.usable - DEVICE_MEMORY.in_use()
    import psutil

    return int(psutil.virtual_memory().available)


def copy_rate(device: str, size_bytes: int, clock: Callable[[], float]) -> float:
    """Bytes read and written per second by the fastest copy of `size_bytes`."""
    import torch

    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / _shortest(lambda: target.copy_(source), device, clock, COPY_BUDGET_S)


def _shortest(operation: Callable[[], object], device: str, clock: Callable[[], float], budget_s: float) -> float:
    """Seconds of the shortest of three or more runs within the budget, each to its end on the device, after a first."""

    def once() -> float:
        start = clock()
        operation()
        if not device.startswith("cpu"):
            import torch

            torch.cuda.synchronize(device)
        return clock() - start

    once()
    runs = [once() for _ in range(3)]
    while sum(runs) < budget_s:
        runs.append(once())
    return min(runs)
