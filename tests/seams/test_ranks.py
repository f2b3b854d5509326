"""Which ranks must run the same modules, and what is agreed among them; the agreement of real ranks: `tests_scale`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from grpo_autotune.seams.ranks import InStep, backward_in_step, forward_in_step, most, sharded

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
