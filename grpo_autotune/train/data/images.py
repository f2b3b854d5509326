"""Images of a data set: each can be read, and each distinct one is resized once, for this run and all later ones.

Resized images are files in the cache folder, named by their content's hash and the size, so rows that share an image
share its file, and a search that tries the same size again finds it there. Every trainer and rollout engine then sees
the same smaller image, whatever its own processor's limits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageOps

from grpo_autotune.errors import DataError
from grpo_autotune.files import cache_dir, write_whole
from grpo_autotune.seams.stored_images import (
    BATCH_ROWS,
    ImageColumn,
    Stored,
    image_column,
    image_columns,
    image_feature,
)

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises on a file that is not a whole image."""

JPEG_END = b"\xff\xd9"
JPEG_QUALITY = 95
TELL_EVERY = 4 * BATCH_ROWS


@dataclass(frozen=True)
class _Column(ImageColumn):
    """An image column with the folder that relative paths start from, and the data set's name, for messages."""

    base: Path
    where: str

    def content(self, image: Stored) -> bytes:
        """The image file's bytes."""
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        return self.path(image).read_bytes()

    def path(self, image: Stored) -> Path:
        """The path of an image's file."""
        if image["path"] is None:
            raise ValueError("neither a path nor bytes")
        return self.base / str(image["path"])


def prepare_images(
    rows: datasets.Dataset, image_size: int | None, base: Path, where: str, progress: Callable[[str], None]
) -> datasets.Dataset:
    """Make the columns `image` and `images` readable, no side of an image longer than asked.

    Args:
        rows: Rows whose images are paths, bytes, or `datasets` images; an image that is None stays None.
        image_size: Longest side in pixels; larger images are shrunk, aspect kept, none is enlarged. None leaves all.
        base: Folder that relative paths start from.
        where: The data set's name, for messages.
        progress: Told what is under way.

    Raises:
        DataError: For the first image that cannot be read, naming its row (counted from 0).
    """
    names = image_columns(rows.column_names)
    if image_size is not None and not names:
        progress(f"data.image_size is {image_size}, and {where} has no images")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name in names:
            column = _column(rows, name, base, where)
            larger, moved = _check(column, image_size, pool, progress)
            if larger and image_size is not None:
                progress(f"resizing the images of {where} to {image_size} px")
                rows = _replace(rows, column, _shrink_all(column, image_size, pool, progress))
            elif moved:
                rows = _replace(rows, column, _absolute(column))
            else:
                rows = rows.cast_column(name, image_feature(column.several, decode=True))
    return rows


def _column(rows: datasets.Dataset, name: str, base: Path, where: str) -> _Column:
    try:
        plain = image_column(rows, name)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"the column {name} holds {rows.features[name]}, not images",
            where=where,
            fix="Map another in data.columns.",
        ) from error
    return _Column(name, plain.rows, plain.several, base, where)


def _check(
    column: _Column, image_size: int | None, pool: Executor, progress: Callable[[str], None]
) -> tuple[bool, bool]:
    """Read every image; answer if one is larger than asked, and if a path is relative.

    Raises:
        DataError: For a broken image.
    """

    def check(numbered: tuple[int, Stored]) -> tuple[bool, bool]:
        row, image = numbered
        try:
            side = _longest_side(column.content(image))
        except READ_ERRORS as error:
            file = f" {column.path(image)}" if image["path"] else ""
            reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))  # Pillow names the buffer it read from
            raise DataError(f"cannot read the image{file}: {reason}", where=f"{column.where}, row {row}") from error
        relative = image["bytes"] is None and not Path(image["path"]).is_absolute()
        return image_size is not None and side > image_size, relative

    larger = moved = False
    for start, images in column.batches():
        _tell(start, column, "checked", progress)
        numbered = [(start + at, image) for at, row in enumerate(images) for image in row if image is not None]
        for big, relative in pool.map(check, numbered):
            larger, moved = larger or big, moved or relative
    return larger, moved


def _longest_side(content: bytes) -> int:
    """Longest side in pixels of a whole image; it is decoded only where nothing cheaper proves that it is whole.

    A PNG carries checksums, and a whole JPEG ends in an end marker (ITU T.81, section B.1.1.3).
    """
    with Image.open(BytesIO(content)) as image:
        side = max(image.size)
        if image.format == "PNG":
            image.verify()
        elif image.format != "JPEG" or JPEG_END not in content[-64:]:
            image.load()
    return side


def _shrink_all(
    column: _Column, image_size: int, pool: Executor, progress: Callable[[str], None]
) -> Iterator[list[Stored | None]]:
    """Each row's images as paths of files that are no larger than asked; each distinct image is worked on once."""
    folder = cache_dir("images")
    done: dict[str, str] = {}

    def digest(image: Stored) -> str:
        return hashlib.sha256(column.content(image)).hexdigest()[:40]

    def shrink(item: tuple[str, Stored]) -> str:
        return str(_shrunk(column.content(item[1]), folder / f"{item[0]}-{image_size}", image_size))

    for start, images in column.batches():
        _tell(start, column, "resized", progress)
        present = [image for row in images for image in row if image is not None]
        keys = list(pool.map(digest, present))
        fresh = {key: image for key, image in zip(keys, present, strict=True) if key not in done}
        done.update(zip(fresh, pool.map(shrink, fresh.items()), strict=True))
        left = iter(keys)
        for row in images:
            yield [None if image is None else {"bytes": None, "path": done[next(left)]} for image in row]


def _shrunk(content: bytes, stem: Path, image_size: int) -> Path:
    """Path of the file that holds the image no larger than asked; made if it is not there yet, whole or not at all."""
    with Image.open(BytesIO(content)) as image:
        scale = image_size / max(image.size)
        as_jpeg = image.format == "JPEG"
        target = stem.with_suffix(".jpg" if as_jpeg else ".png")
        if scale >= 1:
            target = stem.with_suffix(f".{(image.format or 'png').lower()}")
        if target.exists():
            return target
        if scale < 1:
            upright = _resizable(ImageOps.exif_transpose(image), as_jpeg)
            width, height = (max(1, round(side * scale)) for side in upright.size)
            small, file = upright.resize((width, height), Image.Resampling.LANCZOS), BytesIO()
            if as_jpeg:
                small.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            else:
                small.save(file, "PNG", compress_level=1)
            content = file.getvalue()
    write_whole(target, content, durable=False)
    return target


def _resizable(image: Image.Image, as_jpeg: bool) -> Image.Image:
    """The image in a mode that can be interpolated and saved: a palette or a bitmap cannot, and PNG knows no CMYK."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image if as_jpeg or image.mode != "CMYK" else image.convert("RGB")


def _absolute(column: _Column) -> Iterator[list[Stored | None]]:
    for _, images in column.batches():
        for row in images:
            yield [
                image
                if image is None or image["bytes"] is not None
                else {"bytes": None, "path": str(column.path(image))}
                for image in row
            ]


def _replace(rows: datasets.Dataset, column: _Column, images: Iterator[list[Stored | None]]) -> datasets.Dataset:
    values: list[Any] = list(images) if column.several else [row[0] for row in images]
    return rows.remove_columns(column.name).add_column(
        column.name, values, feature=image_feature(column.several, decode=True)
    )


def _tell(start: int, column: _Column, what: str, progress: Callable[[str], None]) -> None:
    if start and start % TELL_EVERY == 0:
        progress(f"{what} {start} of {len(column.rows)} rows' images")
