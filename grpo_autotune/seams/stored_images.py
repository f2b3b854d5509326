"""Images as `datasets` stores them, not decoded: the rows of a column, and the size that an image's header tells."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from typing import Any

Stored = Mapping[str, Any]
"""One image: its file's `bytes`, or the `path` of the file."""

IMAGE_COLUMNS = ("image", "images")
"""Columns by which TRL takes images: one per row, or a list of them."""

BATCH_ROWS = 256

THIN = 100
"""Longer side by shorter one from which on the shorter is rounded up: Qwen-VL's processors refuse more than 200."""


@dataclass(frozen=True)
class ImageColumn:
    """One column of images that are not decoded."""

    name: str  # the column's
    rows: Any  # a data set of that column alone
    several: bool  # True where a row holds a list of images

    def batches(self) -> Iterator[tuple[int, list[list[Stored | None]]]]:
        """Number of the first row, and the images of `BATCH_ROWS` rows, a list for each row."""
        for start in range(0, len(self.rows), BATCH_ROWS):
            values = self.rows[start : start + BATCH_ROWS][self.name]
            none: list[Stored | None] = [] if self.several else [None]
            yield start, [none if v is None else v if isinstance(v, list) else [v] for v in values]


def image_columns(names: Collection[str]) -> list[str]:
    """Those of a data set's columns by which TRL takes images."""
    return [name for name in IMAGE_COLUMNS if name in names]


def image_column(rows: Any, name: str) -> ImageColumn:
    """A column of a `datasets.Dataset` as images; TypeError, ValueError or NotImplementedError, as
    `Dataset.cast_column` says it, where it holds something else."""
    import datasets

    lists, item = datasets.List | datasets.LargeList, rows.features[name]
    several = isinstance(item, lists)
    if name == "image" and several and isinstance(item.feature, lists):
        several = False  # one array of pixels
    feature = image_feature(several, decode=False)
    return ImageColumn(name, rows.select_columns([name]).cast_column(name, feature), several)


def image_feature(several: bool, *, decode: bool) -> Any:
    """The feature of a column of images, or of lists of them."""
    import datasets

    image = datasets.Image(decode=decode)
    return datasets.List(image) if several else image


def header_size(image: Stored) -> tuple[int, int]:
    """Width and height in pixels, read from the image's header (about 0.1 ms from a local disk). OSError, SyntaxError,
    ValueError or Image.DecompressionBombError where there is no such file, or it is no image."""
    from PIL import Image

    with Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
        width, height = opened.size
    return width, height


@dataclass(frozen=True)
class Limits:
    """Limits of an image's sides in pixels, and of their product; None is no limit."""

    longest: int | None = None  # of the longer side
    most: int | None = None  # width times height
    least: int | None = None  # the same; what is smaller is enlarged

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height within the limits, aspect kept."""
        if self.longest is not None and self.longest < max(size):
            size = scaled(size, self.longest)
        area = size[0] * size[1]
        if self.most is not None and area > self.most:
            side = math.floor(max(size) * math.sqrt(self.most / area))
            return next(fit for longest in range(side, 0, -1) if math.prod(fit := scaled(size, longest)) <= self.most)
        if self.least is not None and area < self.least:
            side = math.ceil(max(size) * math.sqrt(self.least / area))
            return next(fit for longest in count(side) if math.prod(fit := scaled(size, longest)) >= self.least)
        return size

    def __str__(self) -> str:
        kinds = (self.longest, "{} px"), (self.most, "at most {} pixels"), (self.least, "at least {} pixels")
        return ", ".join(text.format(value) for value, text in kinds if value) or "their own size"


def scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height with another longest side, aspect kept; rounding makes no thin image thinner."""
    most = max(size)
    up = most > THIN * min(size)
    width, height = (-(-side * longest // most) if up else round(side * (longest / most)) for side in size)
    return max(1, width), max(1, height)
