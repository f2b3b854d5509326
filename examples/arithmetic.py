"""Additions of two numbers, as questions with their answers."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement

import datasets

LOW, HIGH = 10, 49
HELD_OUT = 128


def additions(split: str) -> datasets.Dataset:
    """Rows of `prompt` and `answer`: in `test` 128 pairs of numbers, in `train` the others, in either order."""
    pairs = list(combinations_with_replacement(range(LOW, HIGH + 1), 2))
    random.Random(0).shuffle(pairs)
    if split == "test":
        asked = pairs[:HELD_OUT]
    else:
        asked = sorted({pair for a, b in pairs[HELD_OUT:] for pair in ((a, b), (b, a))})
    return datasets.Dataset.from_list([{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in asked])
