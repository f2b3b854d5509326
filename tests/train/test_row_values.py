"""One number per row is taken in any wrapping; anything else is one line with its name and shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from grpo_autotune.errors import RewardError
from grpo_autotune.train.rewards.guard import guard
from grpo_autotune.train.rewards.row_values import row_values

PLAIN = [0.5, 0.0, 1.0]
ARRAY = np.array(PLAIN)


def named(value: Any) -> str:
    """A name that is the same in every process: no address, which a generator's text has."""
    return str(value).partition(" at 0x")[0].strip("<")


@pytest.mark.parametrize(
    "returned",
    [
        PLAIN,
        tuple(PLAIN),
        ARRAY,
        ARRAY[:, None],
        ARRAY[None, :],
        ARRAY.astype("float16"),
        [np.array([value]) for value in PLAIN],
        [[value] for value in PLAIN],
        [[[value]] for value in PLAIN],
        [PLAIN],
        [ARRAY],
        list(ARRAY),
        [torch.tensor(value) for value in PLAIN],
        [np.array(value) for value in PLAIN],
        torch.tensor(PLAIN),
        torch.tensor(PLAIN)[:, None],
        torch.tensor(PLAIN, requires_grad=True) * 1.0,
        torch.tensor(PLAIN, dtype=torch.bfloat16),
        pd.Series(PLAIN, index=["a", "b", "c"]),
        pd.DataFrame({"score": PLAIN}),
        (value for value in PLAIN),
        map(float, PLAIN),
        dict(enumerate(PLAIN)).values(),
        [Decimal("0.5"), Decimal(0), Decimal(1)],
        [Fraction(1, 2), False, np.bool_(True)],
    ],
    ids=named,
)
def test_one_number_per_row_in_any_wrapping(returned: Any) -> None:
    assert row_values(returned, 3) == PLAIN


@pytest.mark.parametrize(
    "returned",
    [
        [0.5, None],
        np.ma.masked_array([0.5, 1.0], mask=[False, True]),
        pd.Series([0.5, None], dtype="Float64"),
        [np.float32(0.5), pd.NA],
        (None if row else 0.5 for row in range(2)),
    ],
    ids=named,
)
def test_a_value_that_is_missing_is_none(returned: Any) -> None:
    assert row_values(returned, 2) == [0.5, None]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (np.array(0.5), "returned ndarray of shape () for 3 completions"),
        (torch.tensor(0.5), "returned Tensor of shape () for 3 completions"),
        (np.float32(0.5), "returned float32 of shape () for 3 completions"),
        (torch.zeros(3, 2), "returned Tensor of shape (3, 2) for 3 completions"),
        (np.zeros(2), "returned ndarray of shape (2,) for 3 completions"),
        (pd.DataFrame({"a": PLAIN, "b": PLAIN}), "returned DataFrame of shape (3, 2) for 3 completions"),
        ([[1.0, 2.0]] * 3, "returned [1.0, 2.0] (list), which is not a number"),
        ([np.zeros(2)] * 3, "returned array([0., 0.]) (ndarray of shape (2,)), which is not"),
        (0.5, "returned float, not a list of numbers"),
        (None, "returned NoneType, not a list of numbers"),
        ("abc", "returned str, not a list of numbers"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned dict, not a list of numbers"),
        ({0.1, 0.2, 0.3}, "returned set, not a list of numbers"),
        ([1.0], "returned 1 values for 3 completions"),
        (iter([1.0]), "returned 1 values for 3 completions"),
        (iter([1.0] * 9), "returned more values for 3 completions"),
        (["0.5"] * 3, "returned '0.5' (str), which is not a number"),
        ([np.str_("0.5")] * 3, "returned np.str_('0.5') (str_), which is not a number"),
        ([complex(1, 0)] * 3, "returned (1+0j) (complex), which is not a number"),
        (np.zeros(3, dtype="complex64"), "returned 0j (complex), which is not a number"),
        ([10**400] * 3, "(int), which is not a number"),
        (["\x1b[31m\x00" * 999] * 3, "(str), which is not a number"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 99 else "",
)
def test_anything_else_is_one_line_with_name_and_shape(returned: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        row_values(returned, 3)
    text = str(caught.value)
    assert told in text and text.isprintable() and len(text) < 200


BATCH: dict[str, Any] = {
    "prompts": [[{"role": "user", "content": [{"type": "text", "text": "two\x00" * 500}]}]] * 2,
    "completions": ["\x1b[31mfour" * 500, "five"],
    "completion_ids": [[1], [2]],
    "answer": ["4" * 999, "4"],
}


def returns(values: Any) -> Callable[..., Any]:
    def judge(**columns: Any) -> Any:
        return values

    return judge


def test_an_async_reward_too_and_a_forgotten_await() -> None:
    async def later(**columns: Any) -> Any:
        return ARRAY[:2, None]

    assert asyncio.run(guard(later, "later", {}, alone=True)(**BATCH)) == [0.5, 0.0]
    coroutine = later()
    with pytest.raises(RewardError, match="reward forgot: returned a coroutine: define the function with `async def`"):
        guard(returns(coroutine), "forgot", {}, alone=True)(**BATCH)
    coroutine.close()


def test_an_iterator_that_raises_is_blamed_like_a_function() -> None:
    def judge(**columns: Any) -> Any:
        return (float({}["gold"]) for _ in range(2))

    with pytest.raises(RewardError, match=r"^reward judge: raised KeyError: 'gold'\. First sample: prompt"):
        guard(judge, "judge", {}, alone=True)(**BATCH)


def test_a_sample_in_a_message_is_printable_and_short() -> None:
    with pytest.raises(RewardError) as caught:
        guard(returns(torch.zeros(2, 2)), "judge", {}, alone=True)(**BATCH)
    text = str(caught.value)
    assert text.startswith("reward judge: returned Tensor of shape (2, 2) for 2 completions. First sample: prompt ")
    assert "completion \\x1b[31mfour" in text and "answer 444" in text
    assert text.isprintable() and len(text) < 400
