"""Sizes of the images of a data set, read from their headers, once a process for each data set.

Nothing is decoded, and a file that many rows share is opened once. Where one image's size cannot be told, or there are
more of them than is worth a look before training starts, none is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

MOST_IMAGES = 100_000
"""Of one data set. A header takes about 0.1 ms from a local disk."""

BATCH_ROWS = 256

KEPT = 16
"""Data sets whose sizes are remembered."""

Size = tuple[int, int]
Sizes = frozenset[Size]

NOTHING_KNOWN: Sizes = frozenset()

_known: dict[str, Sizes] = {}


def image_sizes(data: Iterable[Any]) -> Sizes:
    """Width and height of the images of all these data sets, each size once; empty where that is not known.

    Args:
        data: Each a `datasets.Dataset`, or None where there is none; of anything else nothing is known.
    """
    found = [_sizes(rows) for rows in data if rows is not None]
    return NOTHING_KNOWN.union(*(sizes for sizes in found if sizes is not None)) if None not in found else NOTHING_KNOWN


def _sizes(rows: Any) -> Sizes | None:
    import datasets

    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:
        return None  # streamed, or made anew by a transform each time a row is read
    if rows._fingerprint not in _known:
        found = _read(rows)
        if found is None:
            return None
        _known[rows._fingerprint] = found
        while len(_known) > KEPT:
            _known.pop(next(iter(_known)))
    return _known[rows._fingerprint]


def _read(rows: Any) -> Sizes | None:
    from PIL import Image

    seen: set[str] = set()
    found: set[Size] = set()
    looked_at = 0

    def size(image: Mapping[str, Any]) -> Size:
        with Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
            width, height = opened.size
        return width, height

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name in {"image", "images"}.intersection(rows.column_names):
            stored = _as_stored(rows, name)
            if stored is None:
                return None
            for images in stored:
                files = {image["path"]: image for image in images if image["bytes"] is None}
                fresh = [image for path, image in files.items() if path not in seen]
                fresh += [image for image in images if image["bytes"] is not None]
                seen |= files.keys()
                looked_at += len(fresh)
                if looked_at > MOST_IMAGES:
                    return None
                try:
                    found.update(pool.map(size, fresh))
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # no file here, or no image
                    return None
    return frozenset(found)


def _as_stored(rows: Any, name: str) -> Iterator[list[Mapping[str, Any]]] | None:
    """The images of a column, some rows at a time and not decoded; None where it holds something else."""
    import datasets

    feature = rows.features[name]
    several = isinstance(feature, datasets.List | datasets.LargeList)
    if not isinstance(feature.feature if several else feature, datasets.Image):
        return None
    image = datasets.Image(decode=False)
    column = rows.select_columns([name]).cast_column(name, datasets.List(image) if several else image)

    def batches() -> Iterator[list[Mapping[str, Any]]]:
        for start in range(0, len(column), BATCH_ROWS):
            values = [value or [] if several else [value] for value in column[start : start + BATCH_ROWS][name]]
            yield [image for row in values for image in row if image is not None]

    return batches()
