"""Bytes that a rank holds and sends where N ranks share what a training keeps.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): each rank holds an Nth of the optimizer's state from stage 1 on, of
the gradients from stage 2 on, of the parameters in stage 3 (section 5). Plain data parallelism and stages 1 and 2 send
each gradient twice per step (reduced, and gathered as a gradient or a parameter); stage 3 gathers parameters before
each pass over them instead (section 7). Frozen parameters are shared and gathered like others, and have no gradient.
FSDP2's `fully_shard` is stage 3.
"""

from typing import NamedTuple

from grpo_autotune.estimate.cost import ADAM_VALUES_MOVED, WorkFacts
from grpo_autotune.records.probe import Sharding

MASTER_BYTES = 12.0
"""A trained parameter's float32 copy and two moments, which DeepSpeed keeps for every type (section 3.1: K = 12)."""


class Shares(NamedTuple):
    """One rank's part between two passes, as shares of the whole; 0 for what the host keeps beside a GPU."""

    parameters: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0


WHOLE = Shares()


def shares_of(sharding: Sharding | None, *, on_gpu: bool) -> Shares:
    """Parts that a rank holds."""
    if sharding is None:
        return WHOLE
    parameters, gradients, optimizer = (1.0 / sharding.ranks if sharding.stage >= n else 1.0 for n in (3, 2, 1))
    if on_gpu and sharding.offload_optimizer:
        optimizer, gradients = 0.0, gradients if sharding.stage < 2 else 0.0
    return Shares(0.0 if on_gpu and sharding.offload_parameters else parameters, gradients, optimizer)


def sent_bytes(sharding: Sharding | None, facts: WorkFacts, parameters: float, gathers: float) -> dict[str, float]:
    """Bytes that a rank sends per optimizer step, by what is predicted, where all `parameters` (bytes) are gathered so
    often for generation. A ring sends (N - 1) / N of what it shares. Gradients and weights of an optimizer on the host
    cross the bus, and its values the host's memory."""
    if sharding is None:
        return {}
    part, training, passes = 1.0 / sharding.ranks, facts.training, facts.passes
    gathers += passes * (2.0 + (facts.old_policy + facts.reference) / facts.iterations)
    gathered = gathers * parameters if sharding.stage == 3 else 0.0
    trained = training.trainable * training.trainable_bytes
    reduced = trained * (passes if sharding.stage > 1 else 1) + (trained if sharding.stage < 3 else 0.0)
    on_host = (2 + ADAM_VALUES_MOVED) * trained * part * sharding.offload_optimizer
    between = (1.0 - part) * (gathered + reduced) + part * gathered * sharding.offload_parameters
    return {"collectives": between, "optimizer": on_host}
