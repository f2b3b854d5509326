"""Rewards that other frameworks have built in and TRL has not, by their formulas."""

import importlib
import re
from collections.abc import Sequence
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.called import text_of

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
STEP = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
GSM8K, GSM8K_CHARACTERS = re.compile(r"#### (-?[0-9.,]+)"), 300
GEO3K = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def tag_count(*, completions: Sequence[Any], **columns: Any) -> list[float]:
    """A quarter for each of the four think and answer tags that is there just once (open-r1's `tag_count`)."""
    return [sum(text_of(one).count(tag) == 1 for tag in TAGS) / len(TAGS) for one in completions]


def reasoning_steps(*, completions: Sequence[Any], **columns: Any) -> list[float]:
    """A third for each sign of a step in a completion, 1 at most (open-r1's `reasoning_steps`)."""
    return [min(1.0, len(STEP.findall(text_of(one))) / 3) for one in completions]


def repetition_of_words(
    *, completions: Sequence[Any], ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> list[float]:
    """The share of n-grams of words that are repeated, times `max_penalty` (arXiv 2502.03373, appendix C.2, as open-r1
    and ms-swift count)."""

    def share(words: list[str]) -> float:
        grams = list(zip(*(words[start:] for start in range(ngram_size)), strict=False))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return [share(text_of(one).lower().split()) * max_penalty for one in completions]


def verl_by_data_source(
    *, completions: Sequence[Any], data_source: Sequence[str], ground_truth: Sequence[Any], **columns: Any
) -> list[float]:
    """verl's score for a row's `data_source`, of those in `BY_SOURCE`; ConfigError for another one."""
    scores = []
    for completion, source, truth in zip(completions, data_source, ground_truth, strict=True):
        if source not in BY_SOURCE:
            fix = f"Name verl/utils/reward_score's file for it as the reward. Here: {', '.join(BY_SOURCE)}."
            raise ConfigError(f"verl's built-in reward for {source} is not here", where="rewards", fix=fix)
        scores.append(BY_SOURCE[source](text_of(completion), str(truth)))
    return scores


def _gsm8k(text: str, truth: str) -> float:
    numbers = GSM8K.findall(text[-GSM8K_CHARACTERS:])
    return float(bool(numbers) and numbers[-1].replace(",", "") == truth)


def _geo3k(text: str, truth: str) -> float:
    try:
        grader = importlib.import_module("mathruler.grader")
    except ImportError as error:
        fix = "Install it: pip install mathruler."
        raise ConfigError("verl's reward for geometry3k needs mathruler", where="rewards", fix=fix) from error
    right = bool(grader.grade_answer(grader.extract_boxed_content(text), truth))
    return 0.9 * right + 0.1 * (GEO3K.fullmatch(text) is not None)


BY_SOURCE = {"openai/gsm8k": _gsm8k, "hiyouga/geometry3k": _geo3k}
