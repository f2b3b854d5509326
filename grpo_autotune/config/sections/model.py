"""The `model` section."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from grpo_autotune.config.sections.section import Section
from grpo_autotune.config.template_text import chat_template_text
from grpo_autotune.errors import ConfigError


class ModelSection(Section):
    """The model to train."""

    name_or_path: str | None = None
    """Folder, hub id, or registered model name (`demo`). Exactly one of this and `random_init`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    random_init: str | None = None
    """Architecture to build with random weights (`qwen3-vl-2b`), to measure a model before downloading it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type; `auto` takes the checkpoint's own."""
    attn_implementation: str | None = None
    """Attention kernel, as in `from_pretrained` (`sdpa`, `eager`, `flash_attention_2`, ...)."""
    load_in_4bit: bool = False
    """Load the base weights in 4 bits with bitsandbytes (QLoRA); needs `peft` or `adapter`."""
    adapter: str | None = None
    """Trained adapter to go on from: a run folder of `train`, a checkpoint in it (`runs/one/best`), or a folder that
    PEFT saved. Its own configuration holds; a `peft` section may be left out."""
    adapter_reference: Literal["adapter", "base"] = "adapter"
    """With `adapter`, the reference model of the KL term: that adapter as it is at the start, as in TRL, or the base
    model without it."""
    chat_template: Annotated[str | None, AfterValidator(chat_template_text)] = None
    """Chat template instead of the model's own, as Jinja text or a file (`.jinja`, `.j2`), which is read right away. It
    is saved with what is trained."""
    freeze_vision_tower: bool = False
    """Do not train the vision tower of a vision-language model."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.random_init is None):
            fix = "Set the one that is not wanted to null." if self.name_or_path else "Name a model to train."
            raise ConfigError("give exactly one of model.name_or_path and model.random_init", where="model", fix=fix)
        return self
