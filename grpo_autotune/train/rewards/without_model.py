"""Rewards of texts that no model writes: first calls before training, and completions that were recorded."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from grpo_autotune.train.rewards.build import KEPT_BY_TRL


def keywords(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, Any]:
    """The keywords that TRL gives a reward function for rows of a data set and a text each; token ids are left out."""
    plain = isinstance(rows[0]["prompt"], str)
    return {
        **{name: [row[name] for row in rows] for name in rows[0] if name not in KEPT_BY_TRL},
        "prompts": [row["prompt"] for row in rows],
        "completions": [text if plain else [{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [[] for _ in rows],
        "trainer_state": None,
        **dict.fromkeys(("log_extra", "log_metric"), lambda name, values: None),
    }


def is_asking(function: Any) -> bool:
    """True for a reward that asks endpoints row by row: a judge or a service."""
    return getattr(getattr(function, "remote", None), "kind", "async") != "async"


def ask_first(trainer: Any, phase: Callable[[str], AbstractContextManager[object]]) -> None:
    """Let each reward of a trainer that asks a network make its first calls, in a start-up phase of its name."""
    for name, function in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        if is_asking(function):
            with phase(name):
                rows = list(itertools.islice(iter(trainer.train_dataset), 8))  # of which it takes its `warmup` first
                first = function.remote.warm_up(keywords(rows, ["-"] * len(rows)))
                asyncio.run_coroutine_threadsafe(first, trainer.async_loop).result()
