"""`grpo.advantages: rank`: a completion's advantage is its rank among its group's rewards.

    a_i = c_i / (s + 1e-4),   c_i = 1/2 sum_j sign(r_i - r_j),   s = standard deviation of c over the group

c is the centred rank, ties shared (midranks less their mean: the shaping of Salimans et al. 2017, arXiv:1703.03864,
section 2.1); s and 1e-4 are those of TRL's scaling by group. Rewards that differ by the rounding of their sum are ties.

Legend: N rows of all processes, G generations a prompt, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.speedups.batches.skip_dead import ROUNDING


def rank_advantages(rewards_NF: torch.Tensor, weights_F: torch.Tensor, group: int) -> torch.Tensor:
    """Advantages (N,) of weighted rewards, NaN where a function gave none; 0 for a row without any, which counts in no
    other's rank; `group` is G."""
    weighted = rewards_NF * weights_F.to(rewards_NF)
    scored = ~rewards_NF.isnan().all(dim=1).view(-1, group)
    total = weighted.nansum(dim=1).view(-1, group)
    largest = weighted.abs().nansum(dim=1).view(-1, group).amax(dim=1)[:, None, None]
    apart = total[:, :, None] - total[:, None, :]
    counts = (apart.abs() > ROUNDING * (rewards_NF.shape[1] - 1) * largest) & scored[:, :, None] & scored[:, None, :]
    ranks = 0.5 * (apart.sign() * counts).sum(dim=2)
    spread = (ranks.square().sum(dim=1) / (scored.sum(dim=1) - 1).clamp(min=1)).sqrt()
    return (ranks / (spread[:, None] + 1e-4)).flatten()


class RankAdvantages:
    """Layers on a trainer that put ranks in the place of TRL's advantages, in the batch and in its table."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._ranked = trainer, torch.empty(0)
        self.handles = wrap_rows(trainer, [(find("score"), self._score)], INNER + 1)
        self.handles += wrap_rows(trainer, [(find("rewards"), self._rewards)], INNER - 1)

    def _rewards(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        trainer, rewards_NF = self._trainer, call_next(*args, **kwargs)
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        self._ranked = rank_advantages(rewards_NF, trainer.reward_weights, group)
        return rewards_NF

    def _score(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        output, table = call_next(*args, **kwargs), self._trainer._logs["advantages"]
        for _ in range(min(len(self._ranked), len(table))):
            table.pop()
        table.extend(self._ranked.tolist())
        rows = len(output["advantages"])
        first = self._trainer.accelerator.process_index * rows
        return {**output, "advantages": self._ranked[first : first + rows].to(output["advantages"])}
