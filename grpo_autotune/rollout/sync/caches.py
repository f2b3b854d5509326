"""Caches of vLLM that hold results of older weights, reset when new ones have come.

Two caches hold such results: keys and values of prompts (the prefix cache), and embeddings of images (the encoder
cache, keyed by the image alone). TRL 1.16 resets the first only: with trained vision weights, an image seen before
keeps the embedding of older weights. The cache of processed images holds pixels, which no weight has touched.
"""

from collections.abc import Iterable
from typing import Any


def reset(llm: Any, pushed: Iterable[str]) -> tuple[str, ...]:
    """Reset the caches that the weights `pushed` (trainer's names) make stale; say which."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    llm.reset_prefix_cache()
    if not changes_images(model, pushed):
        return ("prefix",)
    llm.llm_engine.reset_encoder_cache()
    return "prefix", "encoder"


def changes_images(model: Any, pushed: Iterable[str]) -> bool:
    """True if one of these weights is of the parts of vLLM's model that embed images; when in doubt, yes."""
    from vllm.model_executor.models import supports_multimodal

    if not supports_multimodal(model):
        return False
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if not hasattr(model, "get_mm_mapping") or mapper is None:
        return True
    parts = model.get_mm_mapping()
    return any(name.startswith((*parts.tower_model, *parts.connector)) for name in mapper.apply_list(list(pushed)))
