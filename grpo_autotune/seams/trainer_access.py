"""Facts that engine, probe and speed-ups read off a trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPEED_UPS = "_grpo_autotune_speed_ups"
"""Attribute of a trainer that holds what `speed_up` put on it."""

BOTH_KEYS = ("token_type_ids", "mm_token_type_ids")
IMAGE_KEYS = (
    "pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "spatial_shapes",
    "image_sizes", "image_position_ids",
)  # fmt: skip
"""Inputs in TRL's batches: kinds of tokens over prompt and completion, and what belongs to images."""


def compute_dtype(trainer: Any) -> str:
    """Name of the dtype matrix products run in: autocast's where it is on, else the weights'."""
    if trainer.args.bf16:
        return "bfloat16"
    if trainer.args.fp16:
        return "float16"
    return str(trainer.model.dtype).removeprefix("torch.")


def has_fused_head() -> bool:
    """True if this TRL's models compute log-probs themselves, as since 1.15."""
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head")


def end_tokens(trainer: Any) -> list[int]:
    """The tokens that end a completion; before TRL 1.14 the tokenizer's alone."""
    ends: list[int] | None = getattr(trainer, "eos_token_ids", None)
    return [trainer._tokenizer.eos_token_id] if ends is None else ends


def base_of(model: Any) -> Any:
    """The transformers model itself, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def models_of(trainer: Any) -> Iterator[Any]:
    """The policy, and the reference model where there is one, out of DeepSpeed's engine."""
    yield trainer.model
    if getattr(trainer, "ref_model", None) is not None:
        yield getattr(trainer.ref_model, "module", trainer.ref_model)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Nothing of a model is dropped at random inside. Dropout alone is switched: bitsandbytes repacks the 4-bit weights
    of a module in evaluation mode on CPU, for good."""
    from torch.nn.modules.dropout import _DropoutNd

    changed = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def image_tokens(processor: Any, width: int, height: int) -> int | None:
    """Tokens of an image; None where it is no grid of patches: others' method of that name counts tiles, or answers a
    tuple."""
    images: Any = getattr(processor, "image_processor", None)
    count = getattr(images, "get_number_of_image_patches", None)
    if count is None or "image_grid_thw" not in images.model_input_names:
        return None
    return int(count(height, width, {})) // getattr(images, "merge_size", 1) ** 2


def towers_of(model: Any) -> Iterator[Any]:
    """Vision towers of Qwen-VL's kind: called with patches and a grid, they merge squares of patches into tokens."""
    for module in model.modules():
        if hasattr(module, "patch_embed") and hasattr(module, "merger") and hasattr(module, "spatial_merge_size"):
            yield module
