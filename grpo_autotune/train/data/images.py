"""Images of a data set: each can be read, and each distinct one is resized once, for this run and all later ones.

Resized images are files in the cache folder, named by their content's hash and the size, so rows that share an image
share its file, and a search that tries the same size again finds it there. Every trainer and rollout engine then sees
the same smaller image, whatever its own processor's limits. So do images that the data writes out as text, and those
whose values a processor would cut off.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import astuple
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageCms, ImageOps

from grpo_autotune.config.sections.data import IMAGE_LIMITS
from grpo_autotune.errors import DataError
from grpo_autotune.files import cache_dir, write_whole
from grpo_autotune.seams.stored_images import THIN, Limits, Stored, image_columns, image_feature
from grpo_autotune.train.data.pictures import INLINE, RowImages, stored_column

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises on a file that is not a whole image."""

JPEG_END = b"\xff\xd9"
JPEG_QUALITY = 95

CUT_OFF = ("I", "F", "LAB")
"""Beginnings of the modes of which Pillow's conversion to RGB cuts values off, or which it does not know."""
PNG_MODES = frozenset({"L", "LA", "RGB", "RGBA"})
"""Modes that PNG stores and that can be interpolated."""


def prepare_images(
    rows: datasets.Dataset,
    limits: Limits,
    base: Path,
    where: str,
    progress: Callable[[str], None],
    held: Sequence[Sequence[Any]] = (),
    try_size: Callable[[int, int], Any] = lambda height, width: None,
) -> datasets.Dataset:
    """Put each row's images, readable and within `limits`, into `image`, or `images` where they are lists. DataError
    for the first image that cannot be used, naming its row (counted from 0).

    Images are paths, which start from `base`, bytes, text, or `datasets` images, and those that each row's messages
    `held`, as `pictures.lift` has them; None stays None. `try_size` is called with height and width of thin images, and
    raises a ValueError for those that the model refuses."""
    names = image_columns(rows.column_names)
    if not names and any(held):
        names = ["images"]
        rows = rows.add_column("images", [[]] * len(rows), feature=image_feature(True, decode=False))
    if not names:
        for key, value in zip(IMAGE_LIMITS, astuple(limits), strict=True):
            if value is not None:
                progress(f"data.{key} is {value}, and {where} has no images")
        return rows
    columns = [stored_column(rows, name, where) for name in names]
    images = RowImages(columns, held, rows.select_columns(["prompt"]), base, where, progress)
    gathered = len(names) > 1 or any(map(any, held))
    name = "images" if gathered or columns[0].several else "image"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        unfit, files = _check(images, limits, try_size, pool)
        if unfit:
            progress(f"resizing the images of {where} to {limits}")
            return _replace(rows, names, name, _make_all(images, limits, pool))
    if files or gathered:
        return _replace(rows, names, name, (row for _, batch in images.batches("listed") for row in batch))
    rows = rows.cast_column(names[0], image_feature(columns[0].several, decode=True))
    return rows if names == [name] else rows.rename_column(names[0], name)


def _check(images: RowImages, limits: Limits, try_size: Callable[[int, int], Any], pool: Executor) -> tuple[bool, bool]:
    """Read every image; answer if one has to be made anew, and if one is a file."""
    with_frames: list[tuple[int, str]] = []

    def check(numbered: tuple[int, Stored]) -> bool:
        row, image = numbered
        place, path = f"{images.where}, row {row}", f" {image['path']}" if image["path"] else ""
        try:
            size, mode, frames = _look(_content(image))
            shown = limits.fitted(size)
            if max(shown) > THIN * min(shown):
                try_size(*reversed(shown))
        except READ_ERRORS as error:
            reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", getattr(error, "strerror", None) or str(error))
            fix = "Put a whole image there, or remove the row."
            raise DataError(f"cannot read the image{path}: {reason}", where=place, fix=fix) from error
        if frames:
            with_frames.append((row, path))
        return shown != size or frames or mode.startswith(CUT_OFF) or image["path"] == INLINE

    unfit = files = False
    for start, batch in images.batches("checked"):
        numbered = [(row, image) for row, all_of_row in enumerate(batch, start) for image in all_of_row]
        files = files or any(image["bytes"] is None for _, image in numbered)
        unfit = any(list(pool.map(check, numbered))) or unfit
    if with_frames:
        row, path = min(with_frames)
        told = f"the model sees only the first frame of the image{path} ({len(with_frames)} such images)"
        images.progress(f"{images.where}, row {row}: {told}")
    return unfit, files


def _content(image: Stored) -> bytes:
    return Path(image["path"]).read_bytes() if image["bytes"] is None else bytes(image["bytes"])


def _look(content: bytes) -> tuple[tuple[int, int], str, bool]:
    """Width and height of a whole image, its mode, and if it has several frames. It is decoded only where nothing
    cheaper proves that it is whole: a PNG carries checksums, and a whole JPEG ends in an end marker (ITU T.81, section
    B.1.1.3)."""
    with Image.open(BytesIO(content)) as image:
        size, mode, frames = image.size, image.mode, _has_frames(image)
        if image.format == "PNG":
            image.verify()
        elif image.format != "JPEG" or JPEG_END not in content[-64:]:
            image.load()
    return size, mode, frames


def _has_frames(image: Image.Image) -> bool:
    """True for several frames, of which `datasets` would keep the file open; the others of a photo are previews."""
    return image.format != "MPO" and getattr(image, "is_animated", False)


def _make_all(images: RowImages, limits: Limits, pool: Executor) -> Iterator[list[Stored]]:
    """Each row's images as paths of files that are fit to be shown; each distinct image is worked on once."""
    folder = cache_dir("images")
    done: dict[str, str] = {}

    def digest(image: Stored) -> str:
        return hashlib.sha256(_content(image)).hexdigest()[:40]

    def make(item: tuple[str, Stored]) -> str:
        return str(_made(_content(item[1]), folder / item[0], limits))

    for _, batch in images.batches("resized"):
        present = [image for row in batch for image in row]
        keys = list(pool.map(digest, present))
        fresh = {key: image for key, image in zip(keys, present, strict=True) if key not in done}
        done.update(zip(fresh, pool.map(make, fresh.items()), strict=True))
        left = iter(keys)
        for row in batch:
            yield [{"bytes": None, "path": done[next(left)]} for _ in row]


def _made(content: bytes, stem: Path, limits: Limits) -> Path:
    """Path of the file that holds the image fit to be shown; made if it is not there yet, whole or not at all."""
    with Image.open(BytesIO(content)) as image:
        width, height = limits.fitted(image.size)
        as_it_is = (width, height) == image.size and not (image.mode.startswith(CUT_OFF) or _has_frames(image))
        as_jpeg = image.format == "JPEG"
        ending = (image.format or "png").lower() if as_it_is else "jpg" if as_jpeg else "png"
        target = stem.with_name(f"{stem.name}-{width}x{height}.{ending}")
        if target.exists():
            return target
        if not as_it_is:
            upright, file = _storable(ImageOps.exif_transpose(image), as_jpeg), BytesIO()
            small = upright.resize(limits.fitted(upright.size), Image.Resampling.LANCZOS)
            if as_jpeg:
                small.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            else:
                small.save(file, "PNG", compress_level=1)
            content = file.getvalue()
    write_whole(target, content, durable=False)
    return target


def _storable(image: Image.Image, as_jpeg: bool) -> Image.Image:
    """The image in 8 bits per value, and in a mode that can be interpolated and saved."""
    if as_jpeg or image.mode in PNG_MODES:
        return image
    if image.mode.startswith(("I", "F")):
        return _in_8_bits(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The image as shades of grey: its values where all lie in 0 to 255 (255 times those of floats in 0 to 1), else
    stretched from its least to its largest; what is no number counts as the least."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if least >= 0.0 and most <= 255.0:
        least, most = 0.0, 1.0 if image.mode == "F" and most <= 1.0 else 255.0
    shades = (np.nan_to_num(values, nan=least, posinf=most, neginf=least) - least) * (255.0 / ((most - least) or 1.0))
    return Image.fromarray(np.rint(shades).astype(np.uint8))


def _replace(rows: datasets.Dataset, names: list[str], name: str, images: Iterator[list[Stored]]) -> datasets.Dataset:
    several = name == "images"
    values: list[Any] = list(images) if several else [row[0] if row else None for row in images]
    return rows.remove_columns(names).add_column(name, values, feature=image_feature(several, decode=True))
