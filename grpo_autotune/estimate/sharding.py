"""Bytes that a rank holds and moves where N ranks share what a training keeps.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): each rank holds an Nth of the optimizer's state from stage 1 on, of
the gradients from stage 2 on, of the parameters in stage 3 (section 5). Plain data parallelism and stages 1 and 2 send
and receive each gradient twice per step (reduced, and gathered as a gradient or a parameter); stage 3 gathers
parameters before each pass over them instead (section 7). Frozen parameters are shared and gathered like others, and
have no gradient. FSDP2's `fully_shard` is stage 3.
"""

from typing import NamedTuple

from grpo_autotune.records.probe import Sharding

MASTER_BYTES = 12.0
"""A trained parameter's float32 copy and two float32 moments, which DeepSpeed keeps whatever the parameter's type
(section 3.1 of the paper: K = 12)."""


class Shares(NamedTuple):
    """What one rank holds, as shares of the whole; 0 for what is kept on the host, beside a GPU."""

    parameters: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0


WHOLE = Shares()


def shares_of(sharding: Sharding | None, ranks: int, *, on_gpu: bool) -> Shares:
    """Parts that one of so many ranks holds between two passes."""
    if sharding is None:
        return WHOLE
    stage, part = sharding.stage, 1.0 / ranks
    held = Shares(part if stage > 2 else 1.0, part if stage > 1 else 1.0, part if stage > 0 else 1.0)
    if on_gpu and sharding.offload_parameters:
        held = held._replace(parameters=0.0)
    if on_gpu and sharding.offload_optimizer:
        held = held._replace(optimizer=0.0, gradients=held.gradients if stage < 2 else 0.0)
    return held


class Moved(NamedTuple):
    """Passes of an optimizer step that move something between ranks."""

    micro_batches: float  # passes forward and backward
    scorings: float  # passes forward alone
    generations: float  # gathers of all parameters, once or as many times as they are used


def moved_bytes(sharding: Sharding | None, ranks: int, parameters: float, trained: float, passes: Moved) -> float:
    """Bytes that a rank sends per optimizer step, those that it exchanges with its host included: with `parameters` and
    `trained` bytes of all parameters and of those with a gradient. A ring sends (N - 1) / N of what it shares."""
    stage, ring = 0 if sharding is None else sharding.stage, (ranks - 1) / ranks
    gathers = 2.0 * passes.micro_batches + passes.scorings + passes.generations if stage > 2 else 0.0
    reduced = trained * (passes.micro_batches if stage > 1 else 1.0)
    moved = ring * (gathers * parameters + reduced + (trained if stage < 3 else 0.0))
    if sharding is not None:
        moved += gathers * parameters / ranks * sharding.offload_parameters
        moved += 2.0 * trained / ranks * sharding.offload_optimizer
    return moved
