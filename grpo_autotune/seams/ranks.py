"""Ranks in step: where weights or gradients lie in parts, all ranks must run the same modules in the same order.

Each forward of a sharded module (ZeRO-3, FSDP2) gathers its weights from all ranks, and each backward pass adds up
gradients of all: a rank that left one out would leave the others waiting. So whatever a rank decides by its own rows is
agreed first, in one small collective; ranks that share nothing agree with themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any


def sharded(trainer: Any) -> bool:
    """True if no rank has the whole of the weights."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    in_parts = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    return bool(in_parts and trainer.accelerator.num_processes > 1)


def forward_in_step(trainer: Any) -> bool:
    """True while a module's forward waits for other ranks: not where TRL has gathered all weights of ZeRO-3 to generate
    (`trl.models.utils.remove_hooks`)."""
    optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    hooks = getattr(getattr(optimizer, "parameter_offload", optimizer), "forward_hooks", None)
    return sharded(trainer) and (trainer.is_fsdp_enabled or hooks != [])


def backward_in_step(trainer: Any) -> bool:
    """True if each backward pass waits for other ranks: DDP alone lets all but the last of a step go by."""
    several = trainer.accelerator.num_processes > 1
    return bool(several and (trainer.is_fsdp_enabled or trainer.accelerator.state.deepspeed_plugin is not None))


def syncs_each_pass(accelerator: Any) -> bool:
    """True where ranks in step add up gradients in each backward pass, and not in the last of a step alone."""
    each = accelerator.is_fsdp2 and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    return bool(each or accelerator.state.deepspeed_plugin is not None)


def most(numbers: Sequence[int], trainer: Any, in_step: bool) -> list[int]:
    """The largest of each number over all ranks, which must all ask; this rank's own where they are not `in_step`."""
    if not in_step:
        return list(numbers)
    import torch

    told = torch.tensor(numbers, dtype=torch.long, device=trainer.accelerator.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return [int(number) for number in told.tolist()]


def any_of(trainer: Any, in_step: Callable[[Any], bool] = forward_in_step) -> Callable[[bool], bool]:
    """A function that is true on all ranks where its argument is true on one of them, as `most`."""
    return lambda flag: bool(most([flag], trainer, in_step(trainer))[0])
