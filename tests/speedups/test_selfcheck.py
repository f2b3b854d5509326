"""What a speed-up's check takes for a model that it does not fit, and what it leaves to whoever runs the trial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.seams.ranks import InStep
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.selfcheck import SelfCheck
from grpo_autotune.speedups.shared_prefix.choice import Choice
from grpo_autotune.speedups.shared_prefix.flex import Flex

OF_THE_MACHINE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\n"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]


def raising(error: BaseException) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def test_casts_made_for_a_check_are_not_kept() -> None:
    """Before torch 2.10 autocast would go on with them, and no gradient go through."""
    layer, seen = torch.nn.Linear(4, 4), []

    def computed() -> torch.Tensor:
        seen.append(torch.is_autocast_cache_enabled())
        return layer(torch.ones(2, 4))  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16):
        assert SelfCheck(Installed("a speed-up")).run(computed, computed, torch.bfloat16, "values")
        assert torch.is_autocast_cache_enabled()
        layer(torch.ones(2, 4)).sum().backward()
    assert seen == [False, False] and layer.weight.grad is not None


@pytest.mark.parametrize("error", OF_THE_MACHINE)
def test_a_check_that_meets_the_machine_decides_nothing(error: BaseException) -> None:
    installed = Installed("a speed-up")
    check = SelfCheck(installed)
    with pytest.raises(type(error)) as raised:
        check.run(lambda: torch.ones(2), raising(error), torch.float32, "values")
    assert raised.value is error
    assert check.passed is None and installed.fell_back is None


def test_a_model_that_it_does_not_fit_leaves_the_work_to_trl() -> None:
    installed = Installed("a speed-up")
    check = SelfCheck(installed)
    assert not check.run(lambda: torch.ones(2), raising(RuntimeError("no such head")), torch.float32, "values")
    assert installed.fell_back == "its self-check failed: RuntimeError: no such head"


@pytest.mark.parametrize("error", OF_THE_MACHINE)
def test_flex_attention_does_not_take_the_machine_for_the_kernel(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex, nothing = Flex(raising(error)), SimpleNamespace(tokens=4, served={})
    monkeypatch.setattr(Flex, "attend", raising(error))
    with pytest.raises(type(error)):
        flex(None, None, (torch.ones(1),) * 3, nothing, {})  # type: ignore[arg-type]
    choice = Choice(flex)
    monkeypatch.setattr(Choice, "_round", raising(error))
    with pytest.raises(type(error)):
        choice._faster(flex, nothing)  # type: ignore[arg-type]
    assert flex.failed is None


@pytest.mark.parametrize(("returned", "passes"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_last_bit_of_what_a_model_returns_may_differ(returned: torch.dtype, passes: bool) -> None:
    values = torch.linspace(-5.0, -4.0, 100).bfloat16()
    other = torch.where(torch.arange(100) % 9 == 0, values * (1 + 2**-7), values).bfloat16()
    check = SelfCheck(Installed("a speed-up"))
    plain, fast = values.to(returned), other.to(returned)
    assert check.run(lambda: plain, lambda: fast, torch.bfloat16, "log-probs", lambda: plain) is passes
    assert 2e-3 < check.difference < 2.7e-3


@pytest.mark.parametrize(("value", "off"), [(1.0, "off on another rank"), (1.5, "off by 5.0e-01")])
def test_what_another_rank_found_holds_for_all(value: float, off: str) -> None:
    asked: list[bool] = []
    yardsticks: list[int] = []

    class Ranks(InStep):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return True

    def again() -> torch.Tensor:
        yardsticks.append(1)
        return torch.ones(2)

    installed = Installed("a speed-up")
    check = SelfCheck(installed, Ranks(None, lambda trainer: False))
    assert not check.run(lambda: torch.ones(2), lambda: value * torch.ones(2), torch.float32, "values", again)
    assert off in (installed.fell_back or "")
    assert asked == [value != 1.0] * 2 and yardsticks == [1], "all ranks compute the yardstick, or none"
