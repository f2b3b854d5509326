"""The `model` and `peft` sections made real: weights, processor, adapter, and a vision tower that may stay frozen.

`model.dtype: auto` keeps the type that the checkpoint was stored in, as transformers does; TRL alone loads float32.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoProcessor, BitsAndBytesConfig
from trl.trainer.utils import create_model_from_path

from grpo_autotune.config.places import check_model_place
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.registry import is_reference, names, resolve
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.train.models.random_init import random_model_path
from grpo_autotune.train.runs.quiet import CPU_4BIT, tell_dropped

VISION_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
"""Names of the image encoder (`PreTrainedModel.get_encoder` in transformers/modeling_utils.py)."""


def model_source(section: ModelSection, say: Callable[[str], None]) -> str:
    """The source of the weights, a folder or the name of a hub repository; ConfigError for a path to nothing."""
    if section.random_init is not None:
        return str(random_model_path(section.random_init, section.dtype, say))
    name = str(section.name_or_path)
    if name in names("model") or is_reference(name):
        return str(resolve("model", name)())
    check_model_place(name)
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def load_model(
    section: ModelSection, source: str, placement: Mapping[str, Any], *, packed_in: torch.dtype | None = None
) -> Any:
    """The policy before any adapter, from the weights at `source`; the vision tower frozen where asked. TRL decides on
    the device where `placement` (`device_map`, as `arguments.placement` has it) is empty. Weights in 4 bits lie in
    numbers of the type `packed_in`. ConfigError where the weights cannot be loaded, or there is no vision tower to
    freeze."""
    options = {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code, **placement}
    for name in ("revision", "attn_implementation"):
        if getattr(section, name) is not None:
            options[name] = getattr(section, name)
    if section.load_in_4bit:
        options["quantization_config"] = _four_bit(section, packed_in)
    with _load_errors(source):
        model = create_model_from_path(source, **options)
    if section.load_in_4bit and model.device.type == "cpu":
        tell_dropped(CPU_4BIT)
    if section.freeze_vision_tower:
        model.get_submodule(vision_tower(model)).requires_grad_(False)
    return model


def load_processor(section: ModelSection, source: str) -> Any:
    """The model's processor (for text models its tokenizer), padding and cutting prompts on the left; ConfigError where
    none can be loaded from `source`, or it pads on the right all the same."""
    options: dict[str, Any] = {} if section.revision is None else {"revision": section.revision}
    with _load_errors(source):
        processor = AutoProcessor.from_pretrained(
            source,
            padding_side="left",
            truncation_side="left",
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    check_padding(processor, source)
    if section.chat_template is not None:
        for one in (processor, getattr(processor, "tokenizer", processor)):
            one.chat_template = section.chat_template
    return processor


def size_check(section: ModelSection, say: Callable[[str], None]) -> Callable[[int, int], Any]:
    """A call with height and width that raises a ValueError for an image that the model's processor would refuse; the
    processor is loaded on the first call, since few data sets have such an image."""

    @cache
    def patches() -> Callable[..., Any]:
        images = getattr(load_processor(section, model_source(section, say)), "image_processor", None)
        return getattr(images, "get_number_of_image_patches", lambda height, width, options: None)

    return lambda height, width: patches()(height, width, {})


def check_images(processor: Any, columns: Sequence[str]) -> None:
    """ConfigError where the data has an image column, and the processor has nothing for images."""
    images = image_columns(columns)
    if images and not hasattr(processor, "image_processor"):
        what = f"the data has the column {images[0]}, and this model takes no images"
        raise ConfigError(what, where="model", fix="Take a vision-language model, or data without images.")


def check_padding(processor: Any, source: str) -> None:
    """ConfigError for a processor that pads on the right: generation would go on from padding, and ragged image prompts
    fail. It is judged by what it does with two texts of different length, whatever its attributes say."""
    tokenizer = getattr(processor, "tokenizer", processor)
    side = tokenizer.padding_side
    if side == "left" and tokenizer.pad_token is not None:
        shorter = tokenizer(["a", "a b c d e f g h"], padding=True)["attention_mask"][0]
        side = "left" if shorter[-1] else "right"
    if side != "left":
        what = f"the processor of {source} pads on the {side}, and GRPO needs prompts padded on the left"
        fix = "It ignores padding_side='left': correct its tokenizer class, or use another one"
        raise ConfigError(what, where="model.name_or_path", fix=fix)


def vision_tower(model: Any) -> str:
    """Name of the image encoder inside `model`; ConfigError where it has none."""
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in VISION_TOWERS:
            return str(name)
    what = f"{type(model).__name__} has no vision tower to freeze"
    raise ConfigError(what, where="model.freeze_vision_tower", fix="Leave the key out for a text model")


def lora_config(config: RunConfig, model: Any) -> LoraConfig | None:
    """The `peft` section as PEFT's own class, ConfigError where that does not accept a key or value; None without the
    section. A frozen vision tower gets no adapters either."""
    if config.peft is None:
        return None
    keys = {"task_type": "CAUSAL_LM", **config.peft}
    if config.model.freeze_vision_tower:
        keys["exclude_modules"] = _also_exclude(keys.get("exclude_modules"), vision_tower(model))
    try:
        return LoraConfig(**keys)
    except (TypeError, ValueError) as error:
        raise ConfigError(first_line(error), where="peft", fix="The keys are those of peft.LoraConfig") from error


def _also_exclude(given: str | list[str] | None, tower: str) -> str:
    """A pattern for PEFT's `exclude_modules`, matched against full names: the tower, and what was excluded before."""
    patterns = [re.escape(tower) + r"(\..*)?"]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.append(r"(.*\.)?(" + "|".join(re.escape(suffix) for suffix in given) + ")")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _four_bit(section: ModelSection, packed_in: torch.dtype | None) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as QLoRA has it (arXiv 2305.14314, section 3)."""
    dtype = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=packed_in,
    )


@contextmanager
def _load_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fix = "Give a folder with config.json, or a hub id that can be reached (and model.revision there)"
        raise ConfigError(f"cannot load {source}: {first_line(error)}", where="model.name_or_path", fix=fix) from error
    except ImportError as error:
        raise EnvironmentProblem(first_line(error), where="model") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
