"""Stage failures: memory that runs out in different ways, each in a child and by the product's own classifier.

    python -m benchmarks.gpu.failures KIND

provokes one of them in this process and prints what it is called.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.bench import Bench

LIMIT_S = 25.0
LEFT_BYTES = 40 * 2**20


def host() -> None:
    """Ask the host for more than there is."""
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def allocator() -> None:
    """Ask torch's allocator for more than the card has."""
    import torch

    torch.empty(torch.cuda.mem_get_info()[1] + 1, dtype=torch.uint8, device="cuda")


def fill(left_bytes: int = LEFT_BYTES) -> Any:
    """Hold all of the card but a little."""
    import torch

    torch.zeros(1, device="cuda")
    return torch.empty(torch.cuda.mem_get_info()[0] - left_bytes, dtype=torch.uint8, device="cuda")


def cublas() -> None:
    """Make the first handle of cuBLAS on a card that is full."""
    import torch

    side = torch.zeros(512, 512, device="cuda")
    held = fill()
    for _ in range(3):
        side @ side
    torch.cuda.synchronize()
    del held


def graph() -> None:
    """Capture a graph that needs more than is left."""
    import torch

    held, captured = fill(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        torch.zeros(8 * LEFT_BYTES, dtype=torch.uint8, device="cuda")
    del held


def context() -> None:
    """Start a context, and a handle of cuBLAS."""
    import torch

    side = torch.ones(64, 64, device="cuda")
    side @ side
    torch.cuda.synchronize()


def second_process() -> None:
    """Start a context beside a process that has filled the card; what that one is called is printed."""
    held = fill()
    sys.stdout.write(child("context", LIMIT_S))
    sys.stdout.flush()
    del held
    os._exit(0)


def sticky() -> None:
    """Hit a device assertion inside a self-check, which must not take it for a speed-up that does not fit."""
    import torch

    from grpo_autotune.speedups.base import Installed
    from grpo_autotune.speedups.selfcheck import SelfCheck

    installed = Installed("asserting")

    def fast() -> torch.Tensor:
        beyond = torch.arange(4, device="cuda")[torch.tensor([9], device="cuda")].float()
        torch.cuda.synchronize()
        return beyond

    SelfCheck(installed).run(lambda: torch.zeros(1, device="cuda"), fast, torch.float32, "nothing")
    raise RuntimeError(f"the self-check swallowed it: {installed.fell_back}")


def hold() -> None:
    """Fill 2 GB and compute until somebody ends this process."""
    import torch

    held = torch.empty(2**31, dtype=torch.uint8, device="cuda") if torch.cuda.is_available() else None
    side = torch.ones(64, 64) if held is None else torch.ones(16384, 16384, device="cuda")
    sys.stdout.write("holding\n")
    sys.stdout.flush()
    while True:
        side = side @ side


KINDS: dict[str, tuple[Callable[[], None], str]] = {
    "allocator": (allocator, "oom"),
    "cublas": (cublas, "oom"),
    "graph": (graph, "oom"),
    "sticky": (sticky, "crashed"),
    "second_process": (second_process, "oom"),
    "host": (host, "oom"),
    "context": (context, "ok"),
}
"""What provokes it, and what it is to be called."""


def measure(bench: Bench) -> None:
    """Write a row for each kind, and the seconds until a killed process's memory is back."""
    for kind in KINDS if bench.on_gpu else ("host",):  # a context that starts shows that the child works
        with bench.part(kind):
            told = provoked(kind, bench)
            ok = told["status"] == KINDS[kind][1] and "swallowed" not in told["why"]
            bench.row(f"{kind}: called", told["status"], ok=ok, note=f"{told['type']}: {told['why']}")
    with bench.part("killed in a long kernel"):
        bench.row("seconds from a kill to the memory's return", killed_s(bench), "s", predicted=(0.3, 2.0))


def provoked(kind: str, bench: Bench) -> dict[str, str]:
    """The answer of a child about the error that it provoked."""
    told = child(kind, max(5.0, min(LIMIT_S, bench.left())))
    answer: dict[str, str] = json.loads(told)
    return answer


def child(kind: str, limit_s: float) -> str:
    """The line that a child printed.

    Raises:
        RuntimeError: There is none.
    """
    words = [sys.executable, "-m", "benchmarks.gpu.failures", kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")
    return lines[-1]


def killed_s(bench: Bench) -> float:
    """Kill a child that computes, and wait for it and for its memory."""
    import torch

    before = torch.cuda.mem_get_info()[0] if bench.on_gpu else 0
    words = [sys.executable, "-m", "benchmarks.gpu.failures", "hold"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        begin = time.perf_counter()
        os.kill(child.pid, signal.SIGKILL)
        child.wait(timeout=60.0)
        while bench.on_gpu and torch.cuda.mem_get_info()[0] < before - 64 * 2**20 and bench.left() > 1.0:
            time.sleep(0.02)
        return time.perf_counter() - begin


def main() -> None:
    """Provoke one failure and print its class, status and message."""
    kind = sys.argv[1]
    if kind == "hold":
        hold()
    from grpo_autotune.trials.endings import ending_of_error

    told = {"status": "ok", "why": "nothing was raised", "type": ""}
    try:
        KINDS[kind][0]()
    except Exception as error:  # noqa: BLE001
        ending = ending_of_error(error, lambda: None)
        told = {"status": ending.status, "why": (ending.why or "")[:400], "type": type(error).__name__}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a device that asserted would complain at exit


if __name__ == "__main__":
    main()
