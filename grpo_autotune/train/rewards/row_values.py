"""One number per row, out of whatever wrapping a reward function returns it in: arrays, tensors, series, iterators."""

import inspect
import math
import numbers
from collections.abc import Mapping, Set
from itertools import islice
from typing import Any

from grpo_autotune.errors import printable, shortened

MISSING = frozenset({"NoneType", "NAType", "NaTType", "MaskedConstant"})
"""Types of a value that is not there (Python, pandas, NumPy): the reward does not apply to the row."""

SHOWN = 60
"""Characters of a value in a message."""


class NotNumbers(ValueError):
    """Something else than one number per row; the text says what, with type and shape."""


def row_values(returned: Any, rows: int) -> list[float | None]:
    """The numbers that a reward function returned for `rows` completions (B), in their order; None where it has none.

    Taken are sequences and iterators of numbers (`Decimal`, `Fraction`, bool and 0-d arrays too), arrays and tensors of
    any library of shape (B,), (B, 1) or (1, B), on any device, and each number wrapped alone once more; NotNumbers for
    anything else."""
    if inspect.isawaitable(returned):
        raise NotNumbers("returned a coroutine: define the function with `async def`, or await inside it")
    shape = getattr(returned, "shape", None)
    if isinstance(returned, str | bytes | Mapping | Set) or (shape is None and not hasattr(returned, "__iter__")):
        raise NotNumbers(f"returned {type(returned).__name__}, not a list of numbers")
    if shape is not None:
        if math.prod(shape) != rows or rows not in shape:
            raise NotNumbers(f"returned {type(returned).__name__} of shape {tuple(shape)} for {rows} completions")
        array = returned if hasattr(returned, "tolist") else returned.to_numpy()
        returned = (array.reshape(-1) if hasattr(array, "reshape") else array).tolist()
    items = list(islice(iter(returned), rows + 1))
    if len(items) == 1 < rows and len(_plain(items[0], rows)) == rows:
        items = _plain(items[0], rows)
    if len(items) != rows:
        count = len(returned) if hasattr(returned, "__len__") else "more" if len(items) > rows else len(items)
        raise NotNumbers(f"returned {count} values for {rows} completions")
    return [_number(item) for item in items]


def _plain(item: Any, most: int) -> list[Any]:
    """The values inside a sized one that is no text; else none."""
    is_sized = hasattr(item, "__len__") and getattr(item, "shape", None) != ()
    if not is_sized or isinstance(item, str | bytes | Mapping | Set) or len(item) > most:
        return []
    return list(item.tolist() if hasattr(item, "tolist") else item)


def _number(item: Any) -> float | None:
    while len(inside := _plain(item, 1)) == 1:
        item = inside[0]
    if type(item).__name__ in MISSING:
        return None
    is_complex = isinstance(item, numbers.Complex) and not isinstance(item, numbers.Real)
    if not isinstance(item, str | bytes) and not is_complex and hasattr(item, "__float__"):
        try:
            return float(item)
        except (TypeError, ValueError, ArithmeticError, RuntimeError):  # an array of several, a number beyond floats
            pass
    shape = f" of shape {tuple(item.shape)}" if getattr(item, "shape", ()) else ""
    value = shortened(printable(repr(item)), SHOWN)
    raise NotNumbers(f"returned {value} ({type(item).__name__}{shape}), which is not a number")
