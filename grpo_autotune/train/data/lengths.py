"""Prompts longer than `data.max_prompt_tokens`: found before the model loads, by TRL's own tokenization.

An image counts as the tokens that the processor puts in its place. Most processors tell them of its size (vLLM asks
them as well); whether that is so is tried on two rows, and else all prompts go through the processor.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from cachetools import LRUCache
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.errors import DataError
from grpo_autotune.seams.layers import INNER, ClassSlot, Next, wrap
from grpo_autotune.seams.stored_images import header_size, image_column, image_columns
from grpo_autotune.units import plural

WHOLE = "do_not_truncate"
"""Value of `truncation` by which a tokenizer cuts nothing, whatever layer is on it."""
ROWS = 1024
"""Prompts that are tokenized at once."""

Sizes = Sequence[Sequence[tuple[int, int]]]  # height and width of each row's images

_counted: LRUCache[tuple[Any, ...], tuple[Sizes, list[int]]] = LRUCache(8)
"""Sizes and counts of data sets that this process has counted, since trials build on them again."""


def within_limit(
    rows: datasets.Dataset,
    processor: Any,
    options: Mapping[str, Any],
    data: DataSection,
    where: str,
    say: Callable[[str], None],
) -> datasets.Dataset:
    """Rows of data `where` whose prompts, with these options of the chat template, have at most
    `data.max_prompt_tokens` tokens; with `prompt_overflow: left` all of them, the processor cutting text from then on.
    DataError, which names the row, as `prompt_overflow` has it, and where no row is left."""
    limit, overflow = data.max_prompt_tokens, data.prompt_overflow
    if limit is None:
        return rows
    tokenizer = getattr(processor, "tokenizer", processor)
    key = (rows._fingerprint, str(tokenizer), processor.chat_template, repr(options))
    if key not in _counted:
        sizes = image_sizes(rows)
        _counted[key] = sizes, prompt_tokens(rows, processor, options, sizes)
    sizes, counts = _counted[key]
    if overflow == "left":
        wrap(ClassSlot(processor, "__call__"), _cutting(tokenizer, limit), INNER)
    beyond = [row for row, count in enumerate(counts) if count > limit]
    refused = [row for row in beyond if overflow == "error" or (overflow == "left" and sizes[row])]
    if refused:
        why = ", and one with an image is not cut" if overflow == "left" else ""
        raise DataError(
            f"its prompt has {counts[refused[0]]} tokens, more than data.max_prompt_tokens {limit}{why} "
            f"({plural(len(refused), 'such row')})",
            where=f"{where}, row {refused[0]}",
            fix="Shorten it, raise the limit, or set data.prompt_overflow: filter.",
        )
    if beyond:
        longest, done = max(beyond, key=counts.__getitem__), "cut from the left" if overflow == "left" else "left out"
        say(
            f"{where}: {len(beyond)} of {len(rows)} prompts have more than {plural(limit, 'token')} "
            f"(data.max_prompt_tokens), up to {counts[longest]} (row {longest}): {done}"
        )
    if overflow == "left" or not beyond:
        return rows
    if len(beyond) == len(rows):
        told = f"no prompt is short enough: the shortest has {min(counts)} tokens"
        raise DataError(told, where=where, fix="Raise data.max_prompt_tokens.")
    return rows.select(sorted(set(range(len(rows))) - set(beyond)))


def image_sizes(rows: datasets.Dataset) -> Sizes:
    """Height and width of each row's images, read from their headers."""
    names = image_columns(rows.column_names)
    if not names:
        return [()] * len(rows)
    batches = image_column(rows, names[0]).batches()
    return [[header_size(image)[::-1] for image in row if image is not None] for _, batch in batches for row in batch]


def prompt_tokens(rows: datasets.Dataset, processor: Any, options: Mapping[str, Any], sizes: Sizes) -> list[int]:
    """Tokens of each row's prompt, as TRL's trainer gives it to the model; `sizes` as `image_sizes` has them."""
    prompts = rows["prompt"][:]
    starts = range(0, len(prompts), ROWS)
    counts = [n for at in starts for n in _text_tokens(prompts[at : at + ROWS], processor, options, sizes[at:])]
    seen = [row for row, images in enumerate(sizes) if images]
    if not seen:
        return counts
    told = _image_tokens(processor, sizes)
    more = [sum(told.get(size, 1) - 1 for size in images) for images in sizes]
    counts = [count + of_images for count, of_images in zip(counts, more, strict=True)]
    tried = (seen[0], max(seen, key=counts.__getitem__))
    if not told or any(_processed(rows[row], processor, options) != counts[row] for row in tried):
        for row in seen:
            counts[row] = _processed(rows[row], processor, options)
    return counts


def _text_tokens(prompts: Sequence[Any], processor: Any, options: Mapping[str, Any], sizes: Sizes) -> list[int]:
    """Tokens of each prompt before the processor puts more in the place of an image."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts, special = prompts, True
    if not isinstance(prompts[0], str):
        if isinstance(processor, ProcessorMixin):
            unfilled = ([None] * len(images) for images in sizes)
            prompts = [prepare_multimodal_messages(*one) for one in zip(prompts, unfilled, strict=False)]
        texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False, **options)
        begun = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)
        special = isinstance(processor, ProcessorMixin) and not begun
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=special, truncation=WHOLE)["input_ids"]]


def _image_tokens(processor: Any, sizes: Sizes) -> dict[tuple[int, int], int]:
    """Tokens of an image of each size; none where the processor cannot tell."""
    distinct = sorted({size for images in sizes for size in images})
    tell = getattr(processor, "_get_num_multimodal_tokens", None)
    return {} if tell is None else dict(zip(distinct, tell(image_sizes=distinct)["num_image_tokens"], strict=True))


def _processed(row: Mapping[str, Any], processor: Any, options: Mapping[str, Any]) -> int:
    """Tokens of a row's prompt after its images have gone through the processor."""
    images = [image for name in image_columns(row) for image in (row[name] if name == "images" else [row[name]])]
    inputs = processor.apply_chat_template(
        [prepare_multimodal_messages(row["prompt"], images)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"truncation": WHOLE},
        **options,
    )
    return len(inputs["input_ids"][0])


def _cutting(tokenizer: Any, limit: int) -> Callable[..., Any]:
    """A layer on a tokenizer or its processor, which then keeps the last tokens of a text (its `truncation_side`)."""

    def cut(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("truncation") == WHOLE:
            return call_next(*args, **kwargs)
        try:
            return call_next(*args, **{**kwargs, "truncation": True, "max_length": limit})
        finally:
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                backend.no_truncation()  # which a checkpoint's tokenizer.json would have from then on

    return cut
