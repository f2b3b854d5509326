"""Prompts against the model's chat template, tried in TRL's own way before the model loads."""

import random
from collections.abc import Callable
from typing import Any

import datasets
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.errors import ConfigError, DataError
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.train.data.lengths import within_limit
from grpo_autotune.train.data.prompts import MARKER, has_parts, with_prompts

SAMPLE = 50
"""Rows on which the template is tried, beside the first and the last."""
TURN_SIGNS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>")
"""Beginnings of a turn in common templates."""


def fit_prompts(
    rows: datasets.Dataset,
    processor: Any,
    options: dict[str, Any],
    where: str,
    say: Callable[[str], None],
    data: DataSection | None = None,
) -> datasets.Dataset:
    """Try the model's chat template, with these options, on the prompts; a text model gets each turn as one text, and
    what is longer than the section `data` admits is dealt with. ConfigError where there is no template, DataError,
    which names the row, where it refuses a prompt, and as `within_limit`."""
    prompts = rows["prompt"][:]
    if not isinstance(prompts[0], str):
        rows = _through_template(rows, prompts, processor, options, where, say)
    return rows if data is None else within_limit(rows, processor, options, data, where, say)


def _through_template(
    rows: datasets.Dataset,
    prompts: list[Any],
    processor: Any,
    options: dict[str, Any],
    where: str,
    say: Callable[[str], None],
) -> datasets.Dataset:
    if not processor.chat_template:
        processor.chat_template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if not processor.chat_template:
        raise ConfigError(
            "the model has no chat template to make a prompt of messages",
            where="model.name_or_path",
            fix="Take the instruct model, name one in model.chat_template, or set data.prompt_format: text.",
        )
    if not isinstance(processor, ProcessorMixin) and any(map(has_parts, prompts)):
        prompts = [[{**turn, "content": _in_one(turn["content"])} for turn in prompt] for prompt in prompts]
        rows = with_prompts(rows, prompts, where)
    pictured = bool(image_columns(rows.column_names))
    some = random.Random(0).sample(range(len(prompts)), min(SAMPLE, len(prompts)))
    begun = [row for row, prompt in enumerate(prompts) if prompt[-1]["role"] == "assistant"]
    for row in (0, len(prompts) - 1, *some, *begun[:1]):
        try:
            _try(prompts[row], processor, options, pictured=pictured)
        except Exception as error:  # a template is a program, and raises what its author likes
            what = f"the model's chat template refuses this prompt: {error}"
            fix = "Correct the row or model.chat_template; what a system message says can go into data.prompt_template."
            raise DataError(what, where=f"{where}, row {row}", fix=fix) from error
    _tell(prompts, processor, where, say)
    return rows


def _in_one(content: Any) -> Any:
    """A content as one text: templates of text models drop a list of parts, or print it as Python does."""
    return "".join(part.get("text", MARKER) for part in content) if isinstance(content, list) else content


def _try(prompt: Any, processor: Any, options: dict[str, Any], *, pictured: bool) -> None:
    """Make the model's text of a prompt, and with pictures the second one that TRL makes for the training pass."""
    parts = [part for turn in prompt if isinstance(turn["content"], list) for part in turn["content"]]
    images = [part for part in parts if part["type"] == "image"]
    if isinstance(processor, ProcessorMixin):
        unfilled = [None for part in images if "image" not in part]
        prompt = prepare_multimodal_messages(prompt, unfilled if pictured else [])
    (text,) = processor.apply_chat_template([prompt], add_generation_prompt=True, tokenize=False, **options)
    by_token = any(name.endswith("token_type_ids") for name in processor.model_input_names)
    if pictured and apply_chat_template({"prompt": prompt}, processor, **options)["prompt"] != text and by_token:
        raise ValueError("TRL closes its assistant turn in one pass and not in the other, and pictures are lost there")
    sign = getattr(processor, "image_token", None)
    if sign and text.count(sign) > len(images):
        raise ValueError(f"its text holds {sign}, the sign of a picture ({MARKER} says where one belongs)")


def _tell(prompts: list[Any], processor: Any, where: str, say: Callable[[str], None]) -> None:
    """Tell of prompts that may not be meant as they will be taken, in a line for each kind."""
    tokens = getattr(processor, "tokenizer", processor).all_special_tokens
    signs = {*TURN_SIGNS, *(token for token in tokens if token in str(processor.chat_template))}
    texts = [str(prompt) for prompt in prompts]
    kinds = {
        "have been through a chat template, it seems, and go through the model's; data.prompt_format: text takes them "
        "as they are": [any(sign in text for sign in signs) for text in texts],
        "end with an assistant turn, which TRL closes: the model begins a new one": [
            prompt[-1]["role"] == "assistant" for prompt in prompts
        ],
        f"hold {MARKER} where there is no picture: it stays text": [MARKER in text for text in texts],
    }
    for kind, applies in kinds.items():
        if any(applies):
            say(f"{where}: {sum(applies)} of {len(prompts)} prompts {kind} (first: row {applies.index(True)})")
