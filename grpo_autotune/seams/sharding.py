"""Sharding of a training, read off the prepared trainer: a run says what its ranks share, and sharding that was asked
for and did not come about is an error, since libraries fall back to whole copies without a word."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.units import percent

SHARDING = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}
"""Keys of `grpo` with which ranks share a model's weights, and what `accelerate launch` sets for the same."""

MASTER_WEIGHTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""Attributes with a rank's part of the float32 weights, which the optimizer's state goes with, in DeepSpeed's
optimizers for ZeRO-1 and 2, for ZeRO-3, and for bfloat16 with ZeRO-1 (deepspeed/runtime, 0.19)."""


class Sharding(NamedTuple):
    """Shares of a model that one rank holds."""

    name: str  # ZeRO-3, FSDP2
    ranks: int
    parameters: float  # share of the model's numbers on this rank between two uses
    optimizer: float  # share of the trained numbers whose optimizer state is on this rank

    def __str__(self) -> str:
        if self.ranks == 1:
            return f"{self.name} in one process, which holds everything"
        held = f"{percent(self.parameters)} of the parameters and {percent(self.optimizer)} of the optimizer's state"
        return f"{self.name} over {self.ranks} processes: each holds {held}"


def asked_for(keys: Any) -> str | None:
    """The key of `grpo`, or the variable of `accelerate launch`, that asks for sharding; None without any. `keys` is
    the section, or an object with its values."""
    for key, variable in SHARDING.items():
        if keys.get(key) if isinstance(keys, dict) else getattr(keys, key, None):
            return f"grpo.{key}"
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return variable
    return None


def sharding_of(trainer: Any) -> Sharding | None:
    """Shares on this rank of a trainer whose model is prepared; None where every rank holds all of it, unasked."""
    model, trained = trainer.model, [weight for weight in trainer.model.parameters() if weight.requires_grad]
    parameters, optimizer = _share(model.parameters()), _share(trained)
    if hasattr(engine := trainer.model_wrapped, "zero_optimization_stage"):
        kept = [getattr(engine.optimizer, name, ()) for name in MASTER_WEIGHTS]
        here = sum(weight.numel() for parts in kept for weight in parts)
        name, whole = f"ZeRO-{int(engine.zero_optimization_stage())}", sum(numbers_of(weight)[1] for weight in trained)
        optimizer = min(1.0, here / whole) if here and whole else optimizer
    elif any(hasattr(weight, "to_local") for weight in trained):
        name = "FSDP2"
    else:
        return None
    return Sharding(name, trainer.accelerator.num_processes, parameters, optimizer)


def sharding_fact(trainer: Any) -> dict[str, str]:
    """The same for a record, by the name `sharding`; empty without any."""
    shared = sharding_of(trainer)
    return {} if shared is None else {"sharding": str(shared)}


def check_sharded(trainer: Any) -> Sharding | None:
    """Shares on this rank, as `sharding_of`; EnvironmentProblem where something was to be shared, is not, and there is
    more than one process."""
    asked, shared = asked_for(trainer.args), sharding_of(trainer)
    ranks = trainer.accelerator.num_processes
    if asked is None or ranks == 1 or (shared is not None and (shared.optimizer < 1 or shared.name == "ZeRO-0")):
        return shared
    device = trainer.accelerator.device.type
    why = f"accelerate shards by FSDP on GPUs alone, and this trains on {device}. " if "fsdp" in asked.lower() else ""
    what = f"sharding was asked for, and each of {ranks} processes holds the whole model and its optimizer's state"
    fix = f"{why}Remove it to train with whole copies, or use grpo.deepspeed."
    raise EnvironmentProblem(what, where=asked, fix=fix)


def _share(weights: Iterable[Any]) -> float:
    held = [numbers_of(weight) for weight in weights]
    return sum(here for here, _ in held) / max(1, sum(whole for _, whole in held))


def numbers_of(weight: Any) -> tuple[int, int]:
    """Numbers of a weight that are on this rank, and all of them; ZeRO-3 keeps small ones whole (`ds_persist`)."""
    if hasattr(weight, "ds_tensor"):
        return (weight.ds_numel if weight.ds_persist else weight.ds_tensor.numel()), weight.ds_numel
    return (weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel()), weight.numel()
