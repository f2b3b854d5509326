"""TRL's own rewards (`trl.rewards`, TRL 1.16), with parameters that a configuration can give.

Each has TRL's signature. Those that TRL makes by a `get_...` function take that function's arguments as parameters, and
those that read the column `solution` take the name of another one (`column`; a `ConfigError` where the data has none).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl import rewards as trls

from grpo_autotune.train.rewards.builtin import column_of

Messages = Sequence[Mapping[str, Any]]
Log = Callable[[str, list[Any]], None]


def accuracy_reward(
    *, completions: Sequence[Messages], column: str = "solution", log_extra: Log | None = None, **columns: Any
) -> list[float | None]:
    """1 where math-verify finds the completion's LaTeX answer equal to the reference; None where it cannot read it."""
    return list(trls.accuracy_reward(completions, _texts(columns, column), log_extra=log_extra))


def reasoning_accuracy_reward(
    *,
    completions: Sequence[Messages],
    column: str = "solution",
    reasoning_delimiters: list[str] | None = None,
    log_extra: Log | None = None,
    **columns: Any,
) -> list[float | None]:
    """As `accuracy_reward`, of the text behind the last delimiter (by default `["</think>"]`); 0 without one."""
    solution = _texts(columns, column)
    return list(trls.reasoning_accuracy_reward(completions, solution, reasoning_delimiters, log_extra=log_extra))


def cosine_scaled_reward(
    *,
    completions: Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    max_len: int,
    column: str = "solution",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """As `accuracy_reward`, scaled by length: right answers gain by being short, wrong ones by being long. A wrong
    answer gets `min_value_wrong` at length 0 and `max_value_wrong` from `max_len` tokens on, a right one
    `max_value_correct` and `min_value_correct`."""
    wrong, correct = (min_value_wrong, max_value_wrong), (min_value_correct, max_value_correct)
    reward = trls.get_cosine_scaled_reward(max_len, *wrong, *correct)
    return list(reward(completions, _texts(columns, column), completion_ids))


def think_format_reward(*, completions: Sequence[Messages], **columns: Any) -> list[float]:
    """1 where a completion begins with its one `<think>...</think>`."""
    return list(trls.think_format_reward(completions))


def repetition_penalty_reward(
    *, completion_ids: Sequence[Sequence[int]], ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> list[float]:
    """The share of n-grams of tokens that are repeated, times `max_penalty`, which is not positive."""
    return list(trls.get_repetition_penalty_reward(ngram_size, max_penalty)(completion_ids))


def soft_overlong_punishment(
    *, completion_ids: Sequence[Sequence[int]], max_completion_len: int, soft_punish_cache: int, **columns: Any
) -> list[float]:
    """0 up to `max_completion_len - soft_punish_cache` tokens, falling to -1 at `max_completion_len` (DAPO, eq. 13)."""
    return list(trls.get_soft_overlong_punishment(max_completion_len, soft_punish_cache)(completion_ids))


def _texts(columns: Mapping[str, Any], name: str) -> list[str]:
    """math-verify reads text only."""
    return [str(value) for value in column_of(columns, name)]
