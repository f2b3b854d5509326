"""Rows without images among rows with some.

TRL 1.16 hands the processor None for the images of such a row, and Qwen-VL's processors take only an empty list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_autotune.engine.options import EngineOptions
from grpo_autotune.engine.placeholders import image_token_id
from grpo_autotune.seams.layers import INNER, ClassSlot, Handle, wrap


def install(generation: Any, options: EngineOptions) -> list[Handle]:
    """Put the layer on the trainer's processor."""
    if image_token_id(generation.processing_class) is None:
        return []
    return [wrap(ClassSlot(generation.processing_class, "__call__"), _call, INNER)]


def _call(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    images = kwargs.get("images")
    if isinstance(images, list) and any(row is None for row in images) and any(row is not None for row in images):
        kwargs["images"] = [[] if row is None else row for row in images]
    return call_next(*args, **kwargs)
