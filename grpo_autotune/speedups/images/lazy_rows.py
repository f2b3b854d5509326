"""Rows of a data set that are read when somebody looks at them, and images that are decoded once.

TRL's loader hands over a whole generation batch at every micro step and uses it only where it generates. A row here
knows its number and nothing else until it is asked; its images come from a cache, by file or by content.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import datasets
from cachetools import LRUCache
from PIL import Image as Pillow

KEPT_ROWS = 256
"""Rows whose stored values are kept: the G copies of a row come one after the other."""


class Row:
    """A row as TRL uses one: a dictionary to look at and to write into, read on first use.

    No `Mapping`: accelerate rebuilds mappings value by value to move tensors in them, which would read every row.
    """

    __slots__ = ("_index", "_rows", "_values")

    def __init__(self, rows: Rows, index: int) -> None:
        self._rows, self._index = rows, index
        self._values: dict[str, Any] | None = None

    def _read(self) -> dict[str, Any]:
        if self._values is None:
            self._values = self._rows.read(self._index)
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._read()[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's."""
        return self._read().get(name, default)

    def keys(self) -> Any:
        """As a dictionary's."""
        return self._read().keys()

    def values(self) -> Any:
        """As a dictionary's."""
        return self._read().values()

    def items(self) -> Any:
        """As a dictionary's."""
        return self._read().items()


class Rows:
    """A map-style data set of `Row`s, or of plain dictionaries where they must travel between processes.

    Args:
        rows: What is read from.
        decoded: Where decoded images are kept; sizes by `image_bytes`.
        lazy: Whether rows are read on first use.
    """

    def __init__(self, rows: datasets.Dataset, decoded: LRUCache[Hashable, Any], *, lazy: bool) -> None:
        self._features = {name: _image_of(feature) for name, feature in rows.features.items()}
        self._stored = rows
        for name, image in self._features.items():
            if image is not None:
                stored = datasets.Image(decode=False)
                several = not isinstance(rows.features[name], datasets.Image)
                self._stored = self._stored.cast_column(name, datasets.List(stored) if several else stored)
        self.decoded: LRUCache[Hashable, Any] | None = decoded
        self._lazy = lazy
        self._kept: LRUCache[int, dict[str, Any]] = LRUCache(KEPT_ROWS)
        self.reads = 0

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Row | dict[str, Any]:
        return Row(self, index) if self._lazy else self.read(index)

    def __getitems__(self, indices: Sequence[int]) -> list[Row | dict[str, Any]]:
        return [self[index] for index in indices]

    def read(self, index: int) -> dict[str, Any]:
        """A dictionary of the row's values: its images shared with other copies of the row, all else its own."""
        stored = self._kept.get(index)
        if stored is None:
            stored = dict(self._stored[index])
            self._kept[index] = stored
            self.reads += 1
        return {name: self._value(name, value) for name, value in stored.items()}

    def _value(self, name: str, value: Any) -> Any:
        feature = self._features[name]
        if feature is None:
            return copy.deepcopy(value)
        if isinstance(value, list):
            return [self._decode(feature, image) for image in value]
        return self._decode(feature, value)

    def _decode(self, feature: datasets.Image, stored: Any) -> Any:
        if not isinstance(stored, dict):
            return stored
        key = _content(stored), feature.mode
        image = None if self.decoded is None else self.decoded.get(key)
        if image is None:
            image = datasets.Image(mode=feature.mode).decode_example(stored)
            if self.decoded is not None:
                with suppress(ValueError):  # larger than the whole cache
                    self.decoded[key] = image
        return image


def image_bytes(image: Pillow.Image) -> int:
    """Memory of a decoded image, a byte per pixel and band."""
    return image.width * image.height * len(image.getbands())


def _image_of(feature: Any) -> datasets.Image | None:
    """The image feature of a column that holds an image, or a list of them, decoded."""
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return inner if isinstance(inner, datasets.Image) and inner.decode else None


def _content(stored: Mapping[str, Any]) -> Hashable:
    """Key that tells stored images apart: a hash of their bytes, or the file they are in."""
    if stored["bytes"] is None:
        return str(stored["path"])
    return hashlib.blake2b(stored["bytes"], digest_size=20).digest()


def private(row: Any) -> dict[str, Any]:
    """A row for somebody else's code: with images of its own, which may be drawn into."""
    return {name: _own(value) for name, value in row.items()}


def copied(values: Iterable[Any]) -> list[Any]:
    """One value per row (its prompt, its completion) for somebody else's code: no row shares anything with another."""
    return [copy.deepcopy(value) for value in values]


def _own(value: Any) -> Any:
    if isinstance(value, list):
        return [_own(item) for item in value] if any(isinstance(item, Pillow.Image) for item in value) else value
    return value.copy() if isinstance(value, Pillow.Image) else value
