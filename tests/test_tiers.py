"""The fast tier stays fast: a test that is not marked `slow` may neither start a child process nor train."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def step() -> torch.Tensor:
    weight = torch.ones(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.SGD([weight], lr=0.5).step()
    return weight


def a_fork() -> None:
    multiprocessing.get_context("fork").Process(target=int).start()


def a_shell() -> None:
    os.system("true")


def a_subprocess() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize("start", [a_fork, a_shell, a_subprocess])
def test_no_child_process_in_a_fast_test(start: Callable[[], None]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"test_tiers\.py.* starts a child process: .* pytest\.mark\.slow"):
        start()


def test_no_training_in_a_fast_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"trains \(SGD\.step\): mark it with pytest\.mark\.slow"):
        step()


@pytest.mark.slow
def test_a_slow_test_may_do_both() -> None:
    a_subprocess()
    assert step().item() == 0.5


def test_a_test_with_a_model_is_slow(tiny: Callable[[str], Path], request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow")
