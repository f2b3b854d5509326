"""Prompts as messages, whatever shape they have in the data, and each picture where the text has its place."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import datasets
from trl.trainer.utils import remove_none_values

from grpo_autotune.config.sections.data import Source
from grpo_autotune.errors import ConfigError, DataError

Message = Mapping[str, Any]

MARKER = "<image>"
"""Place of a picture in a text."""
MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Names of ShareGPT's turns (`from`, `value`) that are others in a chat template."""


def with_prompts(rows: datasets.Dataset, prompts: Sequence[Any], where: str) -> datasets.Dataset:
    """The rows with other prompts; messages as JSON, for Arrow would give all the same keys and knows no mixture.
    DataError where a value does not come back from `datasets`' JSON as it is (a few numbers of many digits do not)."""
    feature, texts = datasets.Value("string"), prompts
    if not isinstance(prompts[0], str):
        feature, texts = datasets.Json(), [json.dumps(prompt, default=str) for prompt in prompts]
    column = datasets.Dataset.from_dict({"prompt": texts}, features=datasets.Features(prompt=feature))
    for row, (kept, prompt) in enumerate(zip(column["prompt"][:], prompts, strict=True)):
        if kept != prompt:
            told = f"a number or another value of the prompt cannot be kept as it is: {prompt!r}"
            raise DataError(told, where=f"{where}, row {row}", fix="Write it as text.")
    others = [name for name in rows.column_names if name != "prompt"]
    return datasets.concatenate_datasets([rows.select_columns(others), column], axis=1) if others else column


def shaped(prompt: Any, data: Source, where: str, *, pictured: bool) -> Any:
    """A prompt as messages behind the system prompt, or as text where `data` says so; `pictured` data has markers.
    ConfigError where there is a system message already, DataError where the prompt is nothing that can be used."""
    as_text = data.prompt_format == "text"
    if isinstance(prompt, str) and MESSAGES_AS_TEXT.match(prompt) and not as_text:
        with suppress(ValueError):
            prompt = json.loads(prompt)
    elif isinstance(prompt, str) and prompt.strip():
        if as_text:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if as_text or not isinstance(prompt, list) or not prompt:
        wanted = "text that is not empty, or messages (in a table of text, as JSON)"
        raise DataError(f"the prompt is {prompt!r}", where=where, fix=f"It must be {wanted}.")
    messages = [_turn(turn, where) for turn in remove_none_values(prompt)]
    if data.system_prompt is not None and messages[0]["role"] == "system":
        raise ConfigError(
            "the data's prompts have a system message already", where="data.system_prompt", fix="Set it to null."
        )
    if data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    if not pictured and not has_parts(messages):
        return messages
    cut = [turn if turn["role"] == "tool" else {**turn, "content": list(_cut(turn["content"]))} for turn in messages]
    places = [part for turn in cut if turn["role"] != "tool" for part in turn["content"] if part["type"] != "text"]
    return cut if places else messages  # TRL adds none of its own to parts


def has_parts(prompt: Sequence[Message]) -> bool:
    """True if the content of a turn is a list of parts."""
    return any(isinstance(turn["content"], list) for turn in prompt)


def _turn(turn: Any, where: str) -> Message:
    """A turn that has content or, TRL looking that key up all the same, tool calls alone; ShareGPT's in these keys."""
    if isinstance(turn, Mapping) and "role" not in turn and turn.keys() >= {"from", "value"}:
        turn = {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
    content = turn.get("content") if isinstance(turn, Mapping) and turn.get("role") else ()
    are_parts = isinstance(content, list) and content != [] and all(map(_is_part, content))
    if isinstance(content, str) or are_parts or (content is None and turn.get("tool_calls")):
        return {**turn, "content": content}
    raise DataError(
        f"a turn of the prompt is {turn!r}",
        where=where,
        fix="It needs a role, and as content text or parts such as {type: text, text: ...} and {type: image}. "
        "(Where a column mixes text and parts, text like 12 is read as a number.)",
    )


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return kind in ("image", "image_url") or (kind == "text" and isinstance(part.get("text"), str))


def _cut(content: Any) -> Iterator[Message]:
    """The parts of a content, its texts cut where a picture belongs."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        pieces = re.split(f"({MARKER})", part["text"]) if part["type"] == "text" else []
        yield from [{"type": "image"} if piece == MARKER else {**part, "text": piece} for piece in pieces if piece]
        if part["type"] != "text":
            yield part
