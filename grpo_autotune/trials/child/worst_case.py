"""The rows that need most memory: the prompts that become the most tokens, their images counted as the model will.

Of a large data set a sample is looked at: evenly spaced rows, and those whose text is longest.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import datasets

from grpo_autotune.seams.stored_images import header_size, image_column, image_columns
from grpo_autotune.seams.trainer_access import image_tokens

SAMPLE = 2000
LONGEST = 200


def keep_worst_rows(trainer: Any) -> list[str]:
    """Leave the trainer only the rows of one generation that have the most tokens; notes on what was not looked at."""
    rows = trainer.train_dataset
    if not isinstance(rows, datasets.Dataset):
        return ["the longest prompts of a streamed data set are not known: its first rows were taken"]
    count = max(1, trainer.args.generation_batch_size // trainer.num_generations)
    texts = [_text(prompt) for prompt in rows.select_columns(["prompt"])["prompt"][:]]
    looked_at = _sample([len(text) for text in texts])
    tokens = _tokens(trainer.processing_class, rows.select(looked_at), [texts[row] for row in looked_at])
    worst = sorted(range(len(looked_at)), key=lambda at: -tokens[at])[:count]
    trainer.train_dataset = rows.select([looked_at[at] for at in worst])
    if len(looked_at) < len(rows):
        return [f"the longest prompts are those of {len(looked_at)} rows looked at, of {len(rows)}"]
    return []


def _sample(lengths: list[int]) -> list[int]:
    stride = max(1, -(-len(lengths) // SAMPLE))
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:LONGEST]
    return sorted({*range(0, len(lengths), stride), *longest})


def _tokens(processor: Any, rows: datasets.Dataset, texts: list[str]) -> list[int]:
    """Tokens of each row's text and images; the chat template adds the same to all."""
    tokenizer = getattr(processor, "tokenizer", processor)
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for name in image_columns(rows.column_names):
        batches = (batch for _, batch in image_column(rows, name).batches())
        for row, images in enumerate(chain.from_iterable(batches)):
            for width, height in (header_size(image) for image in images if image is not None):
                tokens = image_tokens(processor, width, height)
                counts[row] += width * height if tokens is None else tokens
    return counts


def _text(prompt: Any) -> str:
    """All text of a prompt: a string, or messages whose content is one or holds parts."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return _text(prompt.get("content") or prompt.get("text") or "")
    return " ".join(map(_text, prompt)) if isinstance(prompt, Iterable) else ""
