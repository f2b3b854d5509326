"""A trained model in memory: its base as it was pretrained, with the adapter on it, or the whole weights."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.train.models.load import load_model, load_processor, model_source
from grpo_autotune.trained.source import Trained


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


def load_trained(trained: Trained, *, dtype: str | None = None, with_adapter: bool = True) -> Any:
    """The trained model in evaluation mode, on the device that transformers chooses: a `PeftModel` for an adapter, or
    its base alone without `with_adapter`. `dtype` is by default that of the base's files.

    Raises:
        ConfigError: The base is not there any more, or cannot be loaded, or the adapter is another model's.
    """
    section = base_section(trained)
    section = section if dtype is None else section.model_copy(update={"dtype": dtype})
    model = load_model(section, model_source(section, say), {})
    if trained.adapter is not None and with_adapter:
        model = PeftModel.from_pretrained(model, str(trained.path))
    return model.eval()


def load_trained_processor(trained: Trained) -> Any:
    """The processor that was saved beside the trained weights, else the base's."""
    section = base_section(trained)
    saved = (trained.path / "tokenizer_config.json").is_file()
    return load_processor(section, str(trained.path) if saved else model_source(section, say))
