"""Rows of a data set that are read when somebody looks at them, and images that are decoded once.

TRL's loader hands over a whole generation batch at every micro step and uses it only where it generates. A row here
knows its number and nothing else until it is asked; its images come from a cache, by file or by content.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import datasets
from cachetools import LRUCache
from PIL import Image as Pillow

KEPT_ROWS = 256
"""Rows whose stored values are kept: the G copies of a row come one after the other."""


class Row(dict[str, Any]):
    """A row of a data set: a dictionary to all code, read when it is first looked at or written into."""

    __slots__ = ("_index", "_rows")

    def __init__(self, *values: Any, **more: Any) -> None:
        super().__init__(*values, **more)
        self._rows: Rows | None = None
        self._index = -1

    @classmethod
    def at(cls, rows: Rows, index: int) -> Row:
        """Row `index` of `rows`, not read: its names are there for code in C that takes no method's word for it."""
        row = cls(dict.fromkeys(rows.names))
        row._rows, row._index = rows, index
        return row

    def read(self) -> Row:
        if self._rows is not None:
            super().update(self._rows.read(self._index))
            self._rows = None
        return self

    def to(self, *_: Any, **__: Any) -> Row:
        """The row itself: accelerate asks it to move to a device, and would else read and rebuild it as a mapping."""
        return self

    def pin_memory(self) -> Row:
        """The row itself: torch's loader asks the same before it takes a mapping apart."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == other  # which asks `other` in turn, if it is a row too

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


def _read_first(method: Any) -> Any:
    @functools.wraps(method)
    def read_first(row: Row, *args: Any, **kwargs: Any) -> Any:
        return method(row.read(), *args, **kwargs)

    return read_first


READERS = """
    __contains__ __delitem__ __getitem__ __ior__ __iter__ __len__ __or__ __repr__ __reversed__ __ror__
    __setitem__ clear copy get items keys pop popitem setdefault update values
"""
"""Methods of a dictionary that see its values. Python's own `dict(row)` and `**row` come through `__iter__` and `keys`
where a subclass has an `__iter__` of its own."""

for _name in READERS.split():
    setattr(Row, _name, _read_first(getattr(dict, _name)))


class Rows:
    """A map-style data set of `Row`s, or, not `lazy`, of plain dictionaries, which must travel between processes."""

    def __init__(self, rows: datasets.Dataset, decoded: LRUCache[Hashable, Any], *, lazy: bool) -> None:
        self._features = {name: _image_of(feature) for name, feature in rows.features.items()}
        self._stored = rows
        for name, image in self._features.items():
            if image is not None:
                stored = datasets.Image(decode=False)
                several = not isinstance(rows.features[name], datasets.Image)
                self._stored = self._stored.cast_column(name, datasets.List(stored) if several else stored)
        self.decoded: LRUCache[Hashable, Any] | None = decoded
        self.names = rows.column_names
        self._lazy = lazy
        self._kept: LRUCache[int, dict[str, Any]] = LRUCache(KEPT_ROWS)
        self.reads = 0

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Row | dict[str, Any]:
        return Row.at(self, index) if self._lazy else self.read(index)

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
