"""A guard around each reward function: a mistake in it is one line that names it and shows the first sample.

Without it a reward of the wrong length or of nothing but None shows up as a shape error or as a flat line, hours later.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from grpo_autotune.errors import AutotuneError, RewardError, printable, shortened
from grpo_autotune.seams.layers import Layer, Next, is_async, wrap
from grpo_autotune.seams.stored_images import IMAGE_COLUMNS
from grpo_autotune.seams.table import reward_slots
from grpo_autotune.train.rewards.row_values import NotNumbers, row_values

PATIENCE = 10
"""Calls in which one reward of several may give only None (rows of another task) before that is a mistake."""

FAILED = -math.inf
"""This very object stands for a score that was asked for and could not be had, until `failures` puts another there."""

MOST = 3.4e38
"""Beyond it a reward is infinite in TRL's tensors of float32."""

SHOWN, MOST_SHOWN = 45, 4
"""Characters of a value of the sample in a message, and number of such values."""


def guard(
    function: Callable[..., Any], name: str, params: Mapping[str, Any], *, alone: bool, to_learn: bool = True
) -> Callable[..., Any]:
    """Wrap a reward function of TRL's signature, sync or async: params bound, which win over columns of the same name,
    name kept, its result checked. From a batch of nothing but None nothing can be learned where it stands `alone`;
    where nothing is `to_learn` it is no mistake.

    Calls raise `RewardError` where it raises, returns the wrong number of values, values that are not numbers, or only
    None."""
    check = _ResultCheck(name, patience=(1 if alone else PATIENCE) if to_learn else math.inf)
    if is_async(function):

        async def guarded_async(**batch: Any) -> list[float | None]:
            with blame(name, batch):
                return check(await function(**{**batch, **params}), batch)

        return _named(guarded_async, name, function)

    def guarded(**batch: Any) -> list[float | None]:
        with blame(name, batch):
            return check(function(**{**batch, **params}), batch)

    return _named(guarded, name, function)


@contextmanager
def blame(name: str, batch: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what a reward function raises inside the block into a `RewardError` that names it and shows the first row of
    its arguments, the `batch` (None shows none); our own errors pass."""
    try:
        yield
    except AutotuneError:
        raise
    except Exception as error:
        fix = None if batch is None else _first_sample(batch)
        raise RewardError(f"raised {type(error).__name__}: {error}", where=f"reward {name}", fix=fix) from error


def blame_rewards(trainer: Any) -> None:
    """Let each reward function of a `trl.GRPOTrainer` that was built elsewhere raise errors that name it."""
    for name, awaited, slot in reward_slots(trainer):
        wrap(slot, blaming_layer(name, awaited=awaited))


def blaming_layer(name: str, *, awaited: bool) -> Layer:
    """The layer that `blame_rewards` puts on a reward function, one that TRL awaits or not."""

    async def call_async(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with blame(name):
            return await call_next(*args, **kwargs)

    def call(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with blame(name):
            return call_next(*args, **kwargs)

    return call_async if awaited else call


class _ResultCheck:
    """Checks the results of one reward function, over its life."""

    def __init__(self, name: str, patience: float) -> None:
        self.name, self.patience = name, patience
        self.abstained: int | None = 0  # calls so far, all of them of nothing but None; None once it gave a value

    def __call__(self, values: Any, batch: Mapping[str, Any]) -> list[float | None]:
        try:
            rewards = row_values(values, len(batch["completions"]))
        except NotNumbers as error:
            raise self._error(str(error), batch) from error
        numbers = [value for value in rewards if value is not None]
        if any(abs(number) > MOST and number is not FAILED for number in numbers):
            raise self._error("returned an infinite reward", batch)
        if not all(math.isnan(number) for number in numbers):
            self.abstained = None
        elif self.abstained is not None:
            self.abstained += 1
            if self.abstained >= self.patience:
                raise self._error("returned only None, so there is nothing to learn from", batch)
        return rewards

    def _error(self, what: str, batch: Mapping[str, Any]) -> RewardError:
        return RewardError(what, where=f"reward {self.name}", fix=_first_sample(batch))


def _first_sample(batch: Mapping[str, Any]) -> str:
    """Prompt, completion and columns of the first row, each cut short; images and settings left out."""
    shown = []
    for key, values in batch.items():
        if isinstance(values, list) and values and key != "completion_ids" and key not in IMAGE_COLUMNS:
            shown.append(f"{key.removesuffix('s')} {shortened(printable(_text(values[0])), SHOWN)}")
    return f"First sample: {'; '.join(shown[:MOST_SHOWN])}."


def _text(value: Any) -> str:
    """A value as text; of messages, that of the last one."""
    is_messages = isinstance(value, list) and value and isinstance(value[-1], Mapping) and "content" in value[-1]
    return str(value[-1]["content"] if is_messages else value)


def _named(guarded: Callable[..., Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The guard under the function's name, with the attributes that its author gave the function."""
    guarded.__dict__.update(getattr(function, "__dict__", {}))
    guarded.__name__ = guarded.__qualname__ = name
    return guarded
