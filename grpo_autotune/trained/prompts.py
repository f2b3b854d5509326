"""Prompts of a run as TRL gives them to its model (`GRPOTrainer._tokenize_prompts`)."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.train.data.datasets import first_rows
from grpo_autotune.train.data.templates import fit_prompts

SPARE = 8
"""Rows that are read for each that is wanted, where those with long prompts are left out."""


def first_prompts(config: RunConfig, processor: Any, count: int, say: Callable[[str], None]) -> tuple[list[Any], str]:
    """At most `count` prompts of held-out rows, or else of training rows, and the kind of the rows in a word; raises as
    `first_rows` and `fit_prompts`."""
    spare = 1 if config.data.max_prompt_tokens is None else SPARE
    rows, kind = first_rows(config, count * spare, say)
    rows = fit_prompts(rows, processor, template_options(config), config.data.path, say, config.data)
    return [prompt_of(row, processor) for row in rows.select(range(min(count, len(rows))))], kind


def template_options(config: RunConfig | None) -> dict[str, Any]:
    """Arguments of the chat template: `grpo.chat_template_kwargs`."""
    return (grpo_value("chat_template_kwargs", config) if config is not None else None) or {}


def prompt_of(row: Mapping[str, Any], processor: Any) -> Any:
    """The text of a row, or its turns, for a vision-language model with the row's pictures in their places."""
    prompt = row["prompt"]
    if isinstance(prompt, str) or not isinstance(processor, ProcessorMixin):
        return prompt
    return prepare_multimodal_messages(
        prompt, row.get("images") or ([] if row.get("image") is None else [row["image"]])
    )


def inputs_of(prompt: Any, processor: Any, options: Mapping[str, Any]) -> Any:
    """The model's inputs for one prompt: `input_ids` (1, T), and what else the processor gives."""
    if isinstance(prompt, str):
        return processor(text=[prompt], return_tensors="pt")
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template([prompt], **how, **options)
