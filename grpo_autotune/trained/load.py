"""A trained model in memory: its base as it was pretrained, with the adapter on it, or the whole weights."""

import gc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.console import say
from grpo_autotune.train.models.adapter import with_adapter
from grpo_autotune.train.models.load import load_model, load_processor, model_source
from grpo_autotune.trained.source import Trained, base_section

ANYWHERE: Mapping[str, Any] = MappingProxyType({})


def load_trained(
    trained: Trained,
    *,
    dtype: str | None = None,
    adapted: bool = True,
    placement: Mapping[str, Any] = ANYWHERE,
) -> Any:
    """The trained model in evaluation mode: a `PeftModel` for an adapter, or its base alone if not `adapted`. It is on
    the device that transformers chooses, or where `placement` (`device_map`) says. `dtype` is by default that of
    the run; `auto` is that of the files.

    Raises:
        ConfigError: The base is not there any more, or cannot be loaded, or the adapter is another model's.
    """
    model = load_section(base_section(trained), dtype, placement)
    if trained.adapter is not None and adapted:
        model = with_adapter(model, str(trained.path)).eval()
    return model


def load_section(section: ModelSection, dtype: str | None, placement: Mapping[str, Any] = ANYWHERE) -> Any:
    """The model of a section without an adapter, in evaluation mode; arguments and errors as `load_trained` has them.
    The source is found in the section's own dtype: random weights are drawn in it. In another dtype attention is
    transformers' default, since FlashAttention takes no float32."""
    source = model_source(section, say)
    if dtype is not None:
        section = section.model_copy(update={"dtype": dtype, "attn_implementation": None})
    return load_model(section, source, placement).eval()


def free_memory() -> None:
    """Give back what models that are gone have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_trained_processor(trained: Trained) -> Any:
    """The processor that was saved beside the trained weights (or in the folder around several adapters), else that of
    the run's model, or of the base that an adapter names."""
    saved = (folder for folder in (trained.path, trained.path.parent) if (folder / "tokenizer_config.json").is_file())
    section = base_section(trained) if trained.config is None else trained.config.model
    return load_processor(section, str(next(saved, None) or model_source(section, say)))
