"""Images of each row, wherever the data has them: in a column, one or a list, or inside the parts of a message.

TRL takes them from one column, and a part of a message keeps the place for the next image of its row.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import datasets
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from grpo_autotune.errors import DataError
from grpo_autotune.files import is_file
from grpo_autotune.seams.stored_images import BATCH_ROWS, ImageColumn, Stored, image_column

PARTS = ("image", "image_url")
HELD_BY = ("image", "image_url", "url", "path", "base64")
"""Keys by which a part holds its image (`apply_chat_template` in transformers/processing_utils.py, and OpenAI's)."""

INLINE = "(base64)"
"""Stands for the path of an image that the data writes out as text."""
BASE64 = re.compile(rb"(?!/(?!9j/))[\w+/\s-]{48,}={0,2}\s*", re.ASCII)
"""Longer than the smallest image files; what begins with a slash is a path, unless a JPEG begins so."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LONGEST_PATH = 1024
TELL_EVERY = 4 * BATCH_ROWS


class RowImages(NamedTuple):
    """Images of each row: of the one column that holds any, and those that its messages held (None: a place alone)."""

    columns: list[ImageColumn]
    held: Sequence[Sequence[Any]]
    prompts: datasets.Dataset
    base: Path
    where: str
    progress: Callable[[str], None]

    def batches(self, done: str) -> Iterator[tuple[int, list[list[Stored]]]]:
        """Number of the first row, and the images of some rows in the order of their places, with absolute paths.
        `done` says what becomes of them. DataError where a row has more or fewer than places, or something else."""
        for batches in zip(*(column.batches() for column in self.columns), strict=True):
            start, rows = batches[0][0], list(zip(*(images for _, images in batches), strict=True))
            if start and start % TELL_EVERY == 0:
                self.progress(f"{done} {start} of {len(self.prompts)} rows' images")
            prompts = self.prompts[start : start + len(rows)]["prompt"]
            numbered = enumerate(zip(rows, prompts, strict=True), start)
            yield start, [self._of_row(row, columns, prompt) for row, (columns, prompt) in numbered]

    def _of_row(self, row: int, columns: Sequence[list[Any]], prompt: Any) -> list[Stored]:
        filled = [column for column in columns if column not in ([], [None])]
        rest = iter(filled[0] if filled else ())
        placed = [value or next(rest, ...) for value in (self.held[row] if self.held else ())]
        try:
            if len(filled) > 1:
                raise ValueError("both image and images hold some, and TRL takes one: give the other another name")
            images = [_stored(value, self.base) for value in (*placed, *rest) if value is not ...]
            if isinstance(prompt, list):
                prepare_multimodal_messages(prompt, images=images)  # it compares their number with the places
        except ValueError as error:
            raise DataError(f"the images cannot be used: {error}", where=f"{self.where}, row {row}") from error
        return images


def stored_column(rows: datasets.Dataset, name: str, where: str) -> ImageColumn:
    """A column as images that are not decoded, texts and lists by turns as they are; DataError if it holds none."""
    feature = rows.features[name]
    item = getattr(feature, "feature", feature)
    if isinstance(item, datasets.Json) or (isinstance(item, dict) and not set(item) <= {"bytes", "path"}):
        return ImageColumn(name, rows.select_columns([name]), several=True)
    try:
        return image_column(rows, name)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"the column {name} holds {feature}, not images", where=where, fix="Map another in data.columns."
        ) from error


def lift(prompt: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """Messages with places for images, and what each place held, or None; TRL sees to those in a tool's answer."""
    messages: list[Mapping[str, Any]] = []
    held: list[Any] = []
    for message in prompt:
        parts = message.get("content")
        if isinstance(parts, list) and message["role"] != "tool" and all(isinstance(part, Mapping) for part in parts):
            held += [next(filter(None, map(part.get, HELD_BY)), None) for part in parts if part.get("type") in PARTS]
            left = [{key: value for key, value in part.items() if key not in HELD_BY} for part in parts]
            parts = [{"type": "image"} if part.get("type") in PARTS else part for part in left]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, held


def _stored(value: Any, base: Path) -> Stored:
    """An image as bytes or as an absolute path; ValueError if it is neither, nor text that stands for bytes."""
    if isinstance(value, Image.Image):
        value = datasets.Image().encode_example(value)
    if isinstance(value, Mapping):
        value = next(filter(None, map(value.get, ("bytes", "url", "path"))), None)
    text = value.encode() if isinstance(value, str) else value
    if not isinstance(text, bytes):
        raise ValueError(f"it is given as {type(value).__name__}, not as a path, base64, a data URI or bytes")
    head, _, body = text.partition(b",") if text.startswith(b"data:") else (b"", b"", text)
    if head.endswith(b";base64") or (not head and BASE64.fullmatch(text) and not is_file(base / text.decode())):
        return {"bytes": base64.urlsafe_b64decode(body + b"=="), "path": INLINE}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if head or len(text) > LONGEST_PATH:
        raise ValueError(f"a text of {len(text)} characters that is neither a path nor base64")
    if URL.match(value) and not value.startswith("file://"):
        raise ValueError(f"{value} is a URL, and images are read from files: download it first")
    path = unquote(value.removeprefix("file://")) if value.startswith("file://") else value
    return {"bytes": None, "path": str(base / path)}
