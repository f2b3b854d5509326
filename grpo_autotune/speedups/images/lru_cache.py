"""A dictionary that forgets what was used longest ago once its values take more memory than allowed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LimitedCache(Generic[Value]):
    """Values under keys, `limit_bytes` of them at most; a value larger than that is not kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value, which counts as used; None where there is none."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Value, size_bytes: int) -> None:
        """Keep a value, in place of an older one of this key and of as many others as must go."""
        self.drop(key)
        if size_bytes > self.limit_bytes:
            return
        self._values[key] = value, size_bytes
        self.used_bytes += size_bytes
        while self.used_bytes > self.limit_bytes:
            _, (_, freed_bytes) = self._values.popitem(last=False)
            self.used_bytes -= freed_bytes

    def drop(self, key: Hashable) -> None:
        """Forget a value, if there is one."""
        found = self._values.pop(key, None)
        if found is not None:
            self.used_bytes -= found[1]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self.used_bytes = 0
