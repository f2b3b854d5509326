"""What `train` says of a receipt that does not hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.hardware.device import runtime_facts
from grpo_autotune.records.receipt import ChangedKnob, Receipt
from grpo_autotune.train.runs.receipt_check import (
    WARMUP_STEPS,
    WATCHED_STEPS,
    SpeedWatch,
    differences,
    off_by,
    set_up_otherwise,
)

MACHINE = Machine(
    cpu="c", cores=2, memory_bytes=2**34, gpus=(), python="3.11", platform="p", fingerprint="here",
    versions={"trl": "1.16.0", "torch": "2.13"},
)  # fmt: skip


def receipt(**changes: Any) -> Receipt:
    plain: dict[str, Any] = {
        "machine": "here",
        "hardware": "2 cores of c",
        "versions": {"trl": "1.16.0", "torch": "2.13"},
        "step_s": 2.0,
        "step_s_low": 1.9,
        "step_s_high": 2.1,
        "steps": 7,
        "baseline_step_s": 4.0,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "raced": True,
        "confidence": 0.9,
        "changed": [ChangedKnob(key="grpo.beta", before=0.1, after=0.0, kind="learning", proof="accepted")],
    }
    return Receipt(**plain | changes)


def watched(*cycle_s: float) -> list[str]:
    """What is said over a run whose steps take so long in turn, after a slow start."""
    now, said = [0.0], list[str]()
    watch = SpeedWatch(receipt(), said.append, lambda: (0.0, 0.0), lambda: now[0])
    state = SimpleNamespace(is_world_process_zero=True)
    args = SimpleNamespace(
        steps_per_generation=len(cycle_s), num_iterations=1, gradient_accumulation_steps=1, world_size=1
    )
    watch.on_train_begin(args, state, None)
    for step in range(WARMUP_STEPS + 3 * WATCHED_STEPS):
        now[0] += 60.0 if step < WARMUP_STEPS else cycle_s[step % len(cycle_s)]
        watch.on_step_end(args, state, None)
    return said


def test_on_the_same_machine_nothing_is_said() -> None:
    assert list(differences(receipt(), MACHINE)) == []


def test_another_machine_and_other_versions_are_said() -> None:
    found = list(differences(receipt(machine="there", versions={"trl": "1.15.0", "torch": "2.13"}), MACHINE))
    assert len(found) == 2
    assert "another machine (2 cores of c)" in found[0]
    assert "trl 1.15.0 -> 1.16.0" in found[1] and "torch" not in found[1]


def test_a_device_that_is_set_up_otherwise_is_said() -> None:
    (told,) = set_up_otherwise(receipt(runtime=runtime_facts(torch.device("cpu"))), {"threads": "999"})
    assert told.endswith(f"set up otherwise: threads {torch.get_num_threads()} -> 999")
    tuned = receipt(runtime={"driver": "580.65", "power_limit": "700 W", "sdpa": "cudnn, flash"})
    assert list(set_up_otherwise(tuned, tuned.runtime)) == list(set_up_otherwise(tuned, {})) == []
    (told,) = set_up_otherwise(tuned, {"driver": "580.65", "power_limit": "400 W", "sdpa": "flash", "nccl": "2.28"})
    assert told.endswith("set up otherwise: power_limit 700 W -> 400 W; sdpa cudnn, flash -> flash")


@pytest.mark.parametrize(("step_s", "word"), [(2.5, "25% more"), (1.6, "20% less")])
def test_a_speed_that_is_off_is_said_once(step_s: float, word: str) -> None:
    said = watched(step_s)
    assert len(said) == 1 and word in said[0]


@pytest.mark.parametrize("step_s", [1.85, 2.0, 2.15])
def test_a_speed_within_ten_percent_is_as_promised(step_s: float) -> None:
    assert watched(step_s) == [] and off_by(receipt(), step_s) is None


def test_a_step_that_reuses_completions_is_no_faster_than_promised() -> None:
    assert watched(5.0, 1.0, 1.0, 1.0) == [], "2 s a step on average"
    assert "25% more" in watched(6.4, 1.2, 1.2, 1.2)[0]


def test_a_configuration_with_a_receipt_is_a_configuration() -> None:
    config = RunConfig.from_dict(
        {
            "model": {"name_or_path": "m"},
            "data": {"path": "d"},
            "rewards": [{"name": "r"}],
            "receipt": receipt().model_dump(),
        }
    )
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert config.receipt == receipt()


def test_groups_that_live_now_are_the_reason_for_longer_steps() -> None:
    tuned = receipt(living_share=0.15)
    told = off_by(tuned, 2.8, 0.62)
    assert told is not None and told.endswith(
        ": 62% of the completions are trained on, 15% then, and skip_dead leaves out the others"
    )
    for other in (off_by(receipt(), 2.8, 0.62), off_by(tuned, 2.8, 0.2), off_by(tuned, 1.5, 0.62), off_by(tuned, 2.8)):
        assert other is not None and "answers of another length" in other


def watched_living(tuned: Receipt, *steps: tuple[float, float], cycle: int = 1, on: bool = True) -> list[str]:
    """What is said over a run whose steps train on such a share, and take so long, in turn."""
    now, said, rows = [0.0], list[str](), [8.0, 8.0]  # of an earlier training
    watch = SpeedWatch(tuned, said.append, lambda: (rows[0], rows[1]), lambda: now[0])
    state = SimpleNamespace(is_world_process_zero=True)
    args = SimpleNamespace(
        steps_per_generation=cycle, num_iterations=1, gradient_accumulation_steps=1, world_size=1
    )  # fmt: skip
    watch.on_train_begin(args, state, None)
    for step in range(WARMUP_STEPS + -(-WATCHED_STEPS // cycle) * cycle):
        share, seconds = steps[step % len(steps)]
        now[0] += seconds
        if on:
            rows[0], rows[1] = rows[0] + 16.0, rows[1] + 16.0 * (1.0 - share)
        watch.on_step_end(args, state, None)
    return said


TUNED: dict[str, Any] = {"living_share": 0.2, "living_s": 2.0}  # 1.6 s where none lives, 3.6 s where all do
MIXED = (0.0, 1.6), (0.0, 1.6), (1.0, 3.6)


def test_the_share_of_living_groups_is_that_of_the_watched_steps() -> None:
    (told,) = watched_living(receipt(living_share=0.1), (0.75, 3.0))
    assert "75% of the completions are trained on" in told


def test_a_receipt_tells_the_seconds_of_any_share_of_living_groups() -> None:
    tuned = receipt(**TUNED)
    assert off_by(tuned, 2.8, 0.6) is None and off_by(tuned, 2.0, 0.2) is None and off_by(tuned, 2.0) is None
    told = off_by(tuned, 3.5, 0.6)
    assert told is not None and "25% more than the 2.8 s that the receipt tells where 60% of the completions" in told
    assert watched_living(tuned, *MIXED) == [], "the median alone would be 22 % less"
    (told,) = watched_living(tuned, *((share, seconds + 0.8) for share, seconds in MIXED))
    assert "a step takes 3.2 s here, 33% more than the 2.4 s" in told, "40 % of ten steps' completions"


def test_steps_that_reuse_completions_are_compared_by_cycles() -> None:
    dead, alive = ((0.0, 2.6), (0.0, 0.6)), ((1.0, 4.6), (1.0, 2.6))
    assert watched_living(receipt(**TUNED), *dead, *dead, *alive, cycle=2) == []


def test_a_run_without_the_speed_up_is_compared_with_the_receipt_as_it_is() -> None:
    assert watched_living(receipt(**TUNED), (1.0, 2.1), on=False) == []
    (told,) = watched_living(receipt(**TUNED), (1.0, 3.6), on=False)
    assert "than the 2 s of the receipt" in told and "another configuration" in told
