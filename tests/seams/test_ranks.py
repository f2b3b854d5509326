"""Which ranks must run the same modules, and what is agreed among them; the agreement of real ranks: `tests_scale`."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistNetworkError, HashStore

from grpo_autotune.errors import TrainingError
from grpo_autotune.seams import ranks
from grpo_autotune.seams.ranks import InStep, backward_in_step, forward_in_step, most, passing, sharded

HOOKED = SimpleNamespace(parameter_offload=SimpleNamespace(forward_hooks=["a hook"]))
GATHERED = SimpleNamespace(parameter_offload=SimpleNamespace(forward_hooks=[]))
WITHOUT_OPTIMIZER = SimpleNamespace(forward_hooks=[])
"""An engine that only evaluates has ZeRO's hooks in the place of its optimizer, as TRL's `remove_hooks` knows."""


def trainer(stage: int = 0, fsdp: bool = False, ranks: int = 2, optimizer: Any = HOOKED) -> Any:
    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    accelerator = SimpleNamespace(num_processes=ranks, state=SimpleNamespace(deepspeed_plugin=plugin))
    model = SimpleNamespace(optimizer=optimizer) if stage else SimpleNamespace()
    return SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=fsdp, model_wrapped=model)


@pytest.mark.parametrize(
    ("of", "weights", "forward", "backward"),
    [
        (trainer(), False, False, False),
        (trainer(stage=1), False, False, True),
        (trainer(stage=2), False, False, True),
        (trainer(stage=3), True, True, True),
        (trainer(stage=3, optimizer=GATHERED), True, False, True),
        (trainer(stage=3, optimizer=WITHOUT_OPTIMIZER), True, False, True),
        (trainer(stage=3, optimizer=None), True, True, True),
        (trainer(fsdp=True), True, True, True),
        (trainer(fsdp=True, ranks=1), False, False, False),
        (trainer(stage=3, ranks=1), False, False, False),
    ],
)
def test_who_waits_for_whom(of: Any, weights: bool, forward: bool, backward: bool) -> None:
    assert (sharded(of), forward_in_step(of), backward_in_step(of)) == (weights, forward, backward)


def test_a_rank_by_itself_agrees_with_itself() -> None:
    assert most([True, False, 3], trainer(), False) == [True, False, 3]
    assert InStep(trainer()).any(True) and not InStep(trainer()).any(False)


MEMORY = torch.OutOfMemoryError("no room")
WRONG = ValueError("no gradient")
Pass = Callable[[Any], None]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Exception | None]]:
    """What a pass raises on each of two threads that stand for ranks, and tell each other by a store in memory."""
    monkeypatch.setattr(ranks, "WAIT_S", 0.2)
    monkeypatch.setattr(ranks, "PASSES", 0.0)
    monkeypatch.setattr(ranks, "_passes", ranks._Passes())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")

    def run(*passes: Pass, stage: int = 0) -> list[Exception | None]:
        store, begin = HashStore(), Barrier(len(passes))  # each rank has a thread of its own
        monkeypatch.setattr(ranks, "store_of", lambda name: store)

        def on(rank: int) -> Exception | None:
            of = trainer(stage)
            of.accelerator.process_index, of.args = rank, SimpleNamespace(ddp_timeout=2)
            begin.wait()
            try:
                passes[rank](of)
            except (TrainingError, RuntimeError, ValueError) as error:
                return error
            return None

        with ThreadPoolExecutor(len(passes)) as threads:
            return list(threads.map(on, range(len(passes))))

    return run


def ends(error: Exception | None = None, after_s: float = 0.0) -> Pass:
    def run(of: Any) -> None:
        with passing(of):
            time.sleep(after_s)
            if error is not None:
                raise error

    return run


def alone(told: Exception | None) -> bool:
    return isinstance(told, TrainingError) and "failed alone where ranks wait for each other" in str(told)


def test_an_error_of_one_rank_is_that_of_all_where_nobody_waits(together: Any) -> None:
    assert together(ends(), ends()) == [None, None]
    first, second = together(ends(), ends(WRONG))
    assert str(first) == "rank 1: ValueError: no gradient" and type(first) is RuntimeError and second is WRONG
    assert together(ends(WRONG), ends(WRONG)) == [WRONG, WRONG]
    first, second = together(ends(), ends(MEMORY))
    assert isinstance(first, torch.OutOfMemoryError) and second is MEMORY


def test_a_rank_that_waits_for_another_for_good_ends_the_run(together: Any) -> None:
    first, second = together(ends(after_s=1.0), ends(WRONG))
    assert alone(second) and isinstance(first, RuntimeError)


def test_a_rank_is_waited_for_as_long_as_passes_take(together: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PASSES", 10.0)
    first, second = together(ends(after_s=1.0), ends(WRONG, after_s=0.5))
    assert type(first) is RuntimeError and second is WRONG


def test_parts_of_weights_leave_nobody_to_go_on_alone(together: Any) -> None:
    first, second = together(ends(), ends(WRONG), stage=3)
    assert alone(first) and alone(second)
    assert together(ends(WRONG), ends(WRONG), stage=3) == [WRONG, WRONG]
    first, second = together(ends(), ends(MEMORY), stage=3)
    assert isinstance(first, torch.OutOfMemoryError) and second is MEMORY


def test_passes_within_a_pass_are_told_apart(together: Any) -> None:
    def nested(inner: Exception | None) -> Pass:
        def run(of: Any) -> None:
            with passing(of):
                with suppress(RuntimeError, ValueError):
                    ends(inner)(of)
                ends()(of)
            ends()(of)

        return run

    assert together(nested(None), nested(WRONG)) == [None, None]
    first, _ = together(ends(WRONG), nested(None))
    assert alone(first), "the other is within its first pass, and not at its end"


def test_an_error_in_telling_hides_none(together: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*given: Any) -> Any:
        raise DistNetworkError("connection reset")

    monkeypatch.setattr(HashStore, "set", lost)
    assert together(ends(MEMORY), ends(WRONG)) == [MEMORY, WRONG]
    assert all("cannot tell each other" in str(told) for told in together(ends(), ends()))
    monkeypatch.delenv("MASTER_ADDR")
    assert together(ends(), ends(WRONG)) == [None, WRONG]
