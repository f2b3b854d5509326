"""The built-in rewards.

A reward has TRL's signature: keywords `prompts`, `completions`, `completion_ids` and one list for each column of the
data, all of the batch's length B; it returns B numbers, None where it does not apply to a row. Settings are
keyword-only and come from `rewards[].params`: `column` names the one that holds the reference, and is a `ConfigError`
where the data has none of that name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from grpo_autotune.config.reward_arguments import GIVEN_BY_TRL
from grpo_autotune.errors import ConfigError
from grpo_autotune.train.rewards.answers import completion_text, final_answer, read_box, read_letter, read_number

ANSWER_LAST = r"(?:(?!</?answer>).)*<answer>\s*(?!</?answer>)\S(?:(?!</?answer>).)*</answer>\s*"
"""One answer between tags, not empty, at the end of the text."""

Completion = str | Sequence[Mapping[str, Any]]
Box = tuple[float, float, float, float]
Read = TypeVar("Read")


def exact_match(
    *, completions: Sequence[Completion], column: str = "answer", ignore_case: bool = True, **columns: Any
) -> list[float | None]:
    """1 where the answer is the reference, white space, a last full stop and, with `ignore_case`, capitals apart."""

    def tidy(text: str) -> str:
        text = " ".join(final_answer(text).split()).removesuffix(".").strip()
        return text.casefold() if ignore_case else text

    return [
        None if reference is None else float(tidy(completion_text(completion)) == tidy(str(reference)))
        for completion, reference in zip(completions, column_of(columns, column), strict=True)
    ]


def numeric_match(
    *, completions: Sequence[Completion], column: str = "answer", relative_tolerance: float = 1e-9, **columns: Any
) -> list[float | None]:
    """1 where the last number of the answer is the reference's; None where the reference holds no number.

    The reference is a number, or text such as GSM8K's, whose number stands after `####`. `relative_tolerance` is the
    largest difference that still counts as equal, as a share of the reference; the default forgives rounding in the
    machine's arithmetic and nothing else."""

    def score(wanted: float, given: float | None) -> float:
        return float(given is not None and abs(given - wanted) <= relative_tolerance * max(abs(wanted), 1e-12))

    return _scored(completions, column_of(columns, column), read_number, score)


def regex(*, completions: Sequence[Completion], pattern: str, **columns: Any) -> list[float | None]:
    """1 where the pattern (Python's `re`; a dot matches a line break too) is found anywhere in a completion."""
    compiled = _compiled(pattern)
    return [float(compiled.search(completion_text(completion)) is not None) for completion in completions]


def format(*, completions: Sequence[Completion], pattern: str = ANSWER_LAST, **columns: Any) -> list[float | None]:
    """1 where a whole completion has the form of the pattern; by default it ends in its one `<answer>...</answer>`."""
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(completion_text(completion)) is not None) for completion in completions]


def choice_letter(
    *, completions: Sequence[Completion], column: str = "answer", letters: str = "ABCDE", **columns: Any
) -> list[float | None]:
    """1 where a completion chooses the reference's letter ("The answer is (B)."); None where that has no letter. The
    reference is one of `letters`, text beginning with it, or its number counted from 0."""
    read = partial(read_letter, letters=letters)
    return _scored(completions, column_of(columns, column), read, lambda wanted, given: float(given == wanted))


def box_iou(
    *, completions: Sequence[Completion], column: str = "answer", threshold: float | None = None, **columns: Any
) -> list[float | None]:
    """Intersection over union of the box `[x1, y1, x2, y2]` in a completion and the reference; 0 without a box, None
    without a reference.

    The reference is four numbers or text, in the completion's units. With a `threshold` it is 1 from this overlap on
    and 0 below, instead of the overlap itself."""

    def score(wanted: Box, given: Box | None) -> float:
        overlap = 0.0 if given is None else _overlap(wanted, given)
        return overlap if threshold is None else float(overlap >= threshold)

    return _scored(completions, column_of(columns, column), read_box, score)


def length(
    *, completion_ids: Sequence[Sequence[int]], target_tokens: int, max_tokens: int, **columns: Any
) -> list[float | None]:
    """1 up to `target_tokens`, falling in a straight line to 0 at `max_tokens`, which is above it (ConfigError)."""
    if max_tokens <= target_tokens:
        what = f"max_tokens {max_tokens} must be above target_tokens {target_tokens}"
        raise ConfigError(what, where="rewards[].params of length")
    slack = max_tokens - target_tokens
    return [min(1.0, max(0.0, (max_tokens - len(ids)) / slack)) for ids in completion_ids]


def _scored(
    completions: Sequence[Completion],
    references: Sequence[object],
    read: Callable[[object], Read | None],
    score: Callable[[Read, Read | None], float],
) -> list[float | None]:
    """The score of what is read from each completion against its reference; None where nothing is read from that."""
    pairs = (
        (read(reference), read(completion_text(completion)))
        for completion, reference in zip(completions, references, strict=True)
    )
    return [None if wanted is None else score(wanted, given) for wanted, given in pairs]


def column_of(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """A column of the data, B values; ConfigError where it has none of this name."""
    if name not in columns:
        others = ", ".join(key for key, value in columns.items() if isinstance(value, list) and key not in GIVEN_BY_TRL)
        what = f"the data has no column {name}, which a reward reads"
        fix = f"Columns: {others}. Name one there, or map one in data.columns."
        raise ConfigError(what, where="rewards[].params.column", fix=fix)
    return columns[name]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a pattern: {error}", where="rewards[].params.pattern") from error


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union; a box without area overlaps nothing."""
    areas = [(box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0.0 for box in (a, b)]
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if min(areas) <= 0 or width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (sum(areas) - shared)
