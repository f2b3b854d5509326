"""Trainers on an unlocked engine, and how far its log-probs are from theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune import unlock_vllm
from grpo_autotune.seams.table import find, wrap_rows
from tests.support.exactness import set_to_train

Rows = list[dict[str, Any]]

NATS = 1e-4
"""Largest |log p engine - log p trainer| in float32."""


def unlocked(colocated: Callable[..., Any], kind: str, rows: Rows, keys: dict[str, Any], **grpo: Any) -> Any:
    """A trainer of the fixture `colocated`, built under `unlock_vllm(**keys)`."""
    with unlock_vllm(**{"weight_sync": "merged", **keys}):
        return set_to_train(colocated(kind, rows, **grpo))


def scored(trainer: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """One generation batch, and |log p engine - log p trainer| of its tokens, before any optimizer step."""
    engine: list[list[float]] = []

    def turn(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        completions, logps = call_next(*args, **kwargs)
        engine.extend(logps)
        return completions, logps

    handles = wrap_rows(trainer, [(find("turn"), turn)])
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    for handle in handles:
        handle.remove()
    trained = batch["old_per_token_logps"]
    apart = torch.cat([(torch.tensor(row) - trained[i, : len(row)]).abs() for i, row in enumerate(engine)])
    return batch, apart
