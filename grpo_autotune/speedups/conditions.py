"""Conditions of a trainer that several speed-ups ask about: dropout, a model in parts, and methods of its own.

Where a model drops activations at random, a row's numbers depend on the rows beside it. Where its weights are sharded,
each module's forward gathers them from all ranks: a rank that leaves a module out, since its own images are known or
its own rows are dead, leaves the others waiting.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def active_dropout(model: Any) -> str | None:
    """The key that keeps dropout on in `model`, in words; None where nothing is dropped."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{_key(name)} is {module.p:g}"
        rate = getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"the model's attention_dropout is {rate:g}"
    return None


def _key(name: str) -> str:
    return "peft.lora_dropout" if "lora_dropout" in name else f"grpo.disable_dropout is false and the dropout of {name}"


def in_parts(trainer: Any) -> str | None:
    """The key by which every rank or device must run the same modules, in words; None where each may run its own."""
    if trainer.is_fsdp_enabled:
        return "FSDP shards the model (grpo.fsdp): all ranks must run the same modules"
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO 3 shards the model (grpo.deepspeed): all ranks must run the same modules"
    return in_copies(trainer)


def in_copies(trainer: Any) -> str | None:
    """The reason why a layer put on a module of the model would run on copies of it; None where there are none."""
    if trainer.args.n_gpu > 1:
        return "several GPUs in one process (torch.nn.DataParallel) copy the modules: start one process per GPU"
    return None


LOSS = ("compute_loss", "_compute_loss")
GENERATION = ("_generate_and_score_completions",)


def overridden(trainer: Any, methods: tuple[str, ...]) -> str | None:
    """The method that a subclass of `GRPOTrainer` brings along, in words; None where it has none or is ours."""
    from trl import GRPOTrainer

    for cls in type(trainer).__mro__:
        if cls is GRPOTrainer:
            return None
        if not cls.__module__.startswith("grpo_autotune."):
            for method in methods:
                if method in vars(cls):
                    return f"{cls.__name__} has a `{method}` of its own"
    return None
