"""Conditions of the shared prefix on a trainer, and the sentence for each that fails."""

from collections.abc import Callable
from typing import Any

from grpo_autotune.seams.trainer_access import base_of, models_of
from grpo_autotune.speedups.base import SERVED, kernel_name
from grpo_autotune.speedups.conditions import (
    MICRO_BATCH,
    active_dropout,
    active_noise,
    foreign_hook,
    in_parts,
    overridden,
)

LAYER_TYPES = {"full_attention", "sliding_attention"}


def why_not(trainer: Any, *, one_mask: bool = False) -> str | None:
    """The reason why a prompt cannot be shared on this trainer, in one sentence; None where it can.

    With `one_mask` a group's prompt may have one mask of LoRA's dropout. It drops each element by itself: the masks of
    a completion and its prompt are distributed as in a row of TRL's, and so is the completion's gradient, where no
    other row has a part in it. The masks of two completions are no longer independent."""
    rules = (*_RULES, _coupled if one_mask else _noise)
    return next((reason for rule in rules for reason in [rule(trainer)] if reason is not None), None)


def _noise(trainer: Any) -> str | None:
    noise = active_noise(trainer)
    return None if noise is None else f"{noise}: TRL draws other numbers for the prompt of each completion"


def _coupled(trainer: Any) -> str | None:
    if (noise := active_noise(trainer, lora=False)) is not None:
        return f"{noise}: of all noise, only the mask of peft.lora_dropout can be one for a group"
    if active_dropout(trainer.model) is None:
        return None
    other = overridden(trainer, MICRO_BATCH) or foreign_hook(trainer.model)
    if trainer.top_entropy_quantile < 1.0 or trainer.use_adaptive_entropy:
        other = "grpo.top_entropy_quantile or grpo.use_adaptive_entropy reads the entropies of all completions"
    return None if other is None else f"{other}: a dropout mask that completions share might change their mean gradient"


def _kernel(trainer: Any) -> str | None:
    kinds = {base_of(model).config.get_text_config()._attn_implementation for model in models_of(trainer)}
    other = sorted(str(name) for name in kinds if kernel_name(name) not in SERVED)
    if not other:
        return None
    return f"model.attn_implementation {other[0]} is not supported (supported: {', '.join(SERVED)})"


def _architecture(trainer: Any) -> str | None:
    config = base_of(trainer.model).config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(base_of(trainer.model)).__name__} has an encoder and a decoder"
    other = set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES
    if other or not hasattr(base_of(trainer.model), "base_model"):
        return f"{type(base_of(trainer.model)).__name__} has layers other than attention ({', '.join(sorted(other))})"
    return None


def masks_of_its_own(model: Any) -> str | None:
    """The reason why tokens of an image may see one another both ways, as Gemma 3's do: `generate` asks the model."""
    makes = hasattr(model, "create_masks_for_generate")
    return f"{type(model).__name__} makes attention masks of its own for images" if makes else None


def _aux_loss(trainer: Any) -> str | None:
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router's auxiliary loss (router_aux_loss_coef) counts the prompt once per completion"
    return None


def _virtual_tokens(trainer: Any) -> str | None:
    adapters = getattr(trainer.model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "the adapter puts virtual tokens before the prompt"
    return None


def _compiled(trainer: Any) -> str | None:
    if trainer.args.torch_compile:
        return "a compiled model would be compiled again for every batch (grpo.torch_compile)"
    return None


_RULES: tuple[Callable[[Any], str | None], ...] = (
    _architecture,
    _kernel,
    _aux_loss,
    _virtual_tokens,
    in_parts,
    _compiled,
)
