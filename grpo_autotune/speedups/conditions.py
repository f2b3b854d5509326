"""Conditions that several speed-ups ask about: dropout, a model in parts, code that is not TRL's, and the device.

Where a model drops activations at random, or adds noise to them, a row's numbers depend on the rows beside it.
"""

import functools
from typing import Any

import torch
from torch import nn

from grpo_autotune.seams.trainer_access import base_of, models_of

LORA = "lora_dropout"
"""In the names of PEFT's modules that drop elements of an adapter's input."""


def active_noise(trainer: Any, *, lora: bool = True) -> str | None:
    """The key that has training drop activations or add noise to them, in words; None where neither is on, `lora`'s
    dropout left out if asked."""
    alpha = trainer.args.neftune_noise_alpha
    return active_dropout(trainer.model, lora=lora) if alpha is None else f"grpo.neftune_noise_alpha is {alpha:g}"


def active_dropout(model: Any, *, lora: bool = True) -> str | None:
    """The key that keeps dropout on in `model`, in words; None where nothing is dropped, LoRA's left out if asked."""
    for name, module in model.named_modules():
        rate = _rate(module)
        if rate > 0 and (lora or LORA not in name):
            return f"{_key(name, module)} is {rate:g}"
        rate = getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"the model's attention_dropout is {rate:g}"
    return None


def _rate(module: nn.Module) -> float:
    """The rate at which a module drops: torch's dropout, modules that are named for it, and PEFT's LoHa and LoKr,
    which keep a rate for each adapter."""
    by_adapter = (getattr(module, kind, None) for kind in ("rank_dropout", "module_dropout"))
    rates = [rate for of in by_adapter if isinstance(of, dict) for rate in of.values()]
    if isinstance(module, nn.modules.dropout._DropoutNd) or "Drop" in type(module).__name__:
        rates += [getattr(module, "p", 0.0), getattr(module, "drop_prob", 0.0)]
    return max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)


def _key(name: str, module: nn.Module) -> str:
    if LORA in name:
        return "peft.lora_dropout"
    kept = "grpo.disable_dropout is false and " if isinstance(module, nn.Dropout) else ""  # all that TRL turns off
    return f"{kept}the dropout of {name}"


def waits(device: torch.device) -> bool:
    """True if reading a number of a tensor means waiting for all that its device has been given to do."""
    return device.type != "cpu"


def in_parts(trainer: Any) -> str | None:
    """The key by which a module is called on something other than itself and its weights, in words; None without."""
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        return "FSDP 1 replaces weights by pieces of one flat tensor (grpo.fsdp_config: fsdp_version: 2 does not)"
    return in_copies(trainer)


def in_copies(trainer: Any) -> str | None:
    """The reason why a layer put on a module of the model would run on copies of it; None where there are none."""
    if trainer.args.n_gpu > 1:
        return "several GPUs in one process (torch.nn.DataParallel) copy the modules: start one process per GPU"
    return None


LOSS = ("compute_loss", "_compute_loss")
OF_LIGER = {*LOSS, "_get_per_token_logps_and_entropies"}
GENERATION = ("_generate_and_score_completions",)
MICRO_BATCH = (*LOSS, "_prepare_inputs", "training_step")
"""Methods that see a micro batch, from the scoring of its completions to its gradients."""

REWARDS = "_calculate_rewards"
"""A method that speed-ups read from, so that their layers must be around whatever else is."""

LIBRARIES = {"trl", "transformers", "accelerate", "peft", "torch", "deepspeed", "grpo_autotune", "contextlib"}
"""Packages whose code on a trainer is what speed-ups were made for; a wrapper of `contextlib` tells what it is on."""


def overridden(trainer: Any, methods: tuple[str, ...]) -> str | None:
    """The first of `methods` that is replaced on this trainer, in its class, or on `GRPOTrainer` itself, in words; None
    where all are TRL's or ours. `model.NAME` is a method of the policy, the reference model, the models in their
    adapters and their backbones, which are transformers', PEFT's or the model's own."""
    from trl import GRPOTrainer

    if getattr(trainer, "use_liger_kernel", False) and OF_LIGER & {*methods}:  # an attribute that TRL 1.15 took away
        return "grpo.use_liger_kernel is a loss of its own in TRL before 1.15"
    for method in methods:
        if method.startswith("model."):
            reason = _of_models(trainer, method.removeprefix("model."))
        else:
            if not hasattr(trainer, method):
                return f"the installed TRL has no `{method}`"
            cls = _owner(type(trainer), method)
            if not issubclass(GRPOTrainer, cls) and not cls.__module__.startswith("grpo_autotune."):
                return f"{cls.__name__} has a `{method}` of its own"
            reason = replaced(trainer, method)
        if reason is not None:
            return reason
    return None


def _of_models(trainer: Any, method: str) -> str | None:
    models = list(models_of(trainer))
    bases = [base_of(model) for model in models]
    parts = [*models, *bases, *(base.base_model for base in bases if hasattr(base, "base_model"))]
    return next((reason for part in parts if (reason := replaced(part, method)) is not None), None)


def _owner(cls: type, method: str) -> type:
    """The class that `cls` has the method from; `object` where its objects alone have it."""
    return next((base for base in cls.__mro__ if method in vars(base)), object)


def replaced(holder: Any, method: str) -> str | None:
    """The code of neither `LIBRARIES` nor the holder's class that runs when its `method` is called, in words, or None.
    A wrapper bears the names of what it wraps, so that each link is asked in which module it was written."""
    owner = _owner(type(holder), method)
    for place, name in ((holder, f"the {type(holder).__name__}"), (owner, owner.__name__)):
        link = vars(place).get(method)
        while link is not None:
            module = _module(link)
            if module.partition(".")[0] not in LIBRARIES and module != owner.__module__:
                return f"{name}'s `{method}` was replaced by {getattr(link, '__qualname__', link)} of {module}"
            link = getattr(link, "__wrapped__", None)
    return None


def foreign_code(trainer: Any) -> str | None:
    """The first code on a trainer or its model that is not TRL's or transformers' own, in words; None without any."""
    from trl import GRPOTrainer

    methods = [name for name in dir(GRPOTrainer) if name[:2] != "__" and callable(getattr(GRPOTrainer, name))]
    patches = (replaced(module, "forward") for module in trainer.model.modules())
    reason = overridden(trainer, (*methods, "data_collator", "model.forward")) or foreign_hook(trainer.model)
    return reason or next(filter(None, patches), None)


def foreign_callback(trainer: Any) -> bool:
    """True if a callback of the trainer is of code outside `LIBRARIES`."""
    callbacks = trainer.callback_handler.callbacks
    return any(type(callback).__module__.partition(".")[0] not in LIBRARIES for callback in callbacks)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes of a module that hold its hooks."""


def is_seen(module: nn.Module) -> bool:
    """True where somebody counts the calls of a module, or makes them: a hook of its own or for all, or a forward."""
    attributes = vars(module)
    if "forward" in attributes or any(map(attributes.get, HOOKS)):
        return True
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def foreign_hook(model: nn.Module) -> str | None:
    """The first hook of code outside `LIBRARIES` on a module or a weight of the model, in words, or None."""
    for module in model.modules():
        hooks: list[tuple[Any, Any]] = [(module, vars(module).get(kind)) for kind in HOOKS]
        for weight in module._parameters.values():
            if weight is not None:
                hooks += [(weight, weight._backward_hooks), (weight, weight._post_accumulate_grad_hooks)]
        for part, hook in ((part, hook) for part, some in hooks if some for hook in some.values()):
            if _module(hook).partition(".")[0] not in LIBRARIES:
                return f"a {type(part).__name__} of the model has a hook of {_module(hook)}"
    return None


def _module(function: Any) -> str:
    """The module whose code runs, whatever the function calls itself."""
    plain = getattr(function, "__func__", function)
    while isinstance(plain, functools.partial):
        plain = plain.func
    return str(getattr(plain, "__globals__", {}).get("__name__") or type(plain).__module__)
