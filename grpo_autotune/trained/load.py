"""A trained model in memory: its base as it was pretrained, with the adapter on it, or the whole weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.train.models.load import load_model, load_processor, model_source
from grpo_autotune.trained.source import Trained

ANYWHERE: Mapping[str, Any] = MappingProxyType({})


def base_section(trained: Trained) -> ModelSection:
    """The `model` section that loads what the trained weights stand on: the run's, or the base that an adapter names,
    and of whole weights the trained folder. Never in 4 bits.

    Raises:
        ConfigError: An adapter outside a run does not name its base.
    """
    if trained.adapter is not None and trained.config is not None:
        return trained.config.model.model_copy(update={"load_in_4bit": False})
    name = str(trained.path) if trained.adapter is None else trained.base
    if name is None:
        raise ConfigError("the adapter does not name its base model", where=str(trained.path))
    trusted = trained.config is not None and trained.config.model.trust_remote_code
    return ModelSection(name_or_path=name, trust_remote_code=trusted)


def load_trained(
    trained: Trained,
    *,
    dtype: str | None = None,
    with_adapter: bool = True,
    placement: Mapping[str, Any] = ANYWHERE,
) -> Any:
    """The trained model in evaluation mode: a `PeftModel` for an adapter, or its base alone without `with_adapter`. It
    is on the device that transformers chooses, or where `placement` (`device_map`) says. `dtype` is by default that of
    the run; `auto` is that of the files.

    Raises:
        ConfigError: The base is not there any more, or cannot be loaded, or the adapter is another model's.
    """
    model = load_section(base_section(trained), dtype, placement)
    return _with_adapter(model, trained).eval() if trained.adapter is not None and with_adapter else model


def load_section(section: ModelSection, dtype: str | None, placement: Mapping[str, Any] = ANYWHERE) -> Any:
    """The model of a section without an adapter, in evaluation mode; arguments and errors as `load_trained` has them.
    The source is found in the section's own dtype: random weights are drawn in it."""
    source = model_source(section, say)
    section = section if dtype is None else section.model_copy(update={"dtype": dtype})
    return load_model(section, source, placement).eval()


def load_trained_processor(trained: Trained) -> Any:
    """The processor that was saved beside the trained weights (or in the folder around several adapters), else that of
    the run's model, or of the base that an adapter names."""
    saved = (folder for folder in (trained.path, trained.path.parent) if (folder / "tokenizer_config.json").is_file())
    section = base_section(trained) if trained.config is None else trained.config.model
    return load_processor(section, str(next(saved, None) or model_source(section, say)))


def _with_adapter(model: Any, trained: Trained) -> Any:
    """The model with the adapter on it, every weight of which has found its place: PEFT only warns of a place that
    stays empty, and says nothing of weights that no place is there for."""
    folder = str(trained.path)
    if not any(trained.path.glob("adapter_model.*")):
        raise _misfit(trained, "adapter_model.safetensors is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, folder)
            result = adapted.load_adapter(folder, "default")
    except (RuntimeError, ValueError, KeyError, SafetensorError, OSError) as error:
        if is_of_the_machine(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise _misfit(trained, lines[1] if len(lines) > 1 else lines[0]) from error
    for names, told in ((result.unexpected_keys, "the base has no place for"), (result.missing_keys, "it lacks")):
        if names:
            raise _misfit(trained, f"{told} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    return adapted


def _misfit(trained: Trained, why: str) -> ConfigError:
    base = base_section(trained).name_or_path
    return ConfigError(
        f"the adapter cannot be put on {base}: {why}",
        where=str(trained.path),
        fix="Is it the base it was trained on, and the folder whole?",
    )
