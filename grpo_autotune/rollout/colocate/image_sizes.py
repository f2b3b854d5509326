"""Sizes of the images of a data set, read from their headers, once per process and data set.

Nothing is decoded, and a file that many rows share is opened once. Where one image's size cannot be told, or there are
more of them than is worth a look before training starts, none is known.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cachetools import LRUCache

from grpo_autotune.seams.stored_images import ImageColumn, header_size, image_column, image_columns

MOST_IMAGES = 100_000
"""Of one data set."""

KEPT = 16
"""Data sets whose sizes are remembered."""

Size = tuple[int, int]
Sizes = frozenset[Size]

NOTHING_KNOWN: Sizes = frozenset()

_known: LRUCache[str, Sizes] = LRUCache(KEPT)


def image_sizes(data: Iterable[Any]) -> Sizes:
    """Width and height of the images of all these data sets (a `datasets.Dataset` each, or None), each size once; empty
    where that is not known."""
    union = NOTHING_KNOWN
    for rows in data:
        sizes = NOTHING_KNOWN if rows is None else _sizes(rows)
        if sizes is None:
            return NOTHING_KNOWN
        union |= sizes
    return union


def _sizes(rows: Any) -> Sizes | None:
    import datasets

    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:
        return None  # streamed, or made anew by a transform each time a row is read
    if rows._fingerprint not in _known:
        sizes = _read(rows)
        if sizes is None:
            return None
        _known[rows._fingerprint] = sizes
    return _known[rows._fingerprint]


def _read(rows: Any) -> Sizes | None:
    from PIL import Image

    seen: set[str] = set()
    sizes: set[Size] = set()
    looked_at = 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name in image_columns(rows.column_names):
            column = _column(rows, name)
            if column is None:
                return None
            for _, batch in column.batches():
                images = [image for row in batch for image in row if image is not None]
                files = {image["path"]: image for image in images if image["bytes"] is None}
                fresh = [image for path, image in files.items() if path not in seen]
                fresh += [image for image in images if image["bytes"] is not None]
                seen |= files.keys()
                looked_at += len(fresh)
                if looked_at > MOST_IMAGES:
                    return None
                try:
                    sizes.update(pool.map(header_size, fresh))
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # no file here, or no image
                    return None
    return frozenset(sizes)


def _column(rows: Any, name: str) -> ImageColumn | None:
    """The images of a column; None where it holds something else, which may become images later."""
    import datasets

    feature = rows.features[name]
    return image_column(rows, name) if isinstance(getattr(feature, "feature", feature), datasets.Image) else None
