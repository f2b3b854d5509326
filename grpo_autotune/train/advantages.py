"""`grpo.advantages: rank`: a completion's advantage is its rank among its group's rewards.

    a_i = c_i / (s + 1e-4),   c_i = 1/2 sum_j sign(r_i - r_j),   s = standard deviation of c over the group

c is the centred rank, ties shared (the shaping of Salimans et al. 2017, arXiv:1703.03864, section 2.1); s and 1e-4 are
those of TRL's scaling by group. Rewards that differ by the rounding of their sum are ties.
"""

from typing import Any

import torch

from grpo_autotune.seams.layers import INNER, Next
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.speedups.batches.skip_dead import ROUNDING


def rank_advantages(rewards_NF: torch.Tensor, weights_F: torch.Tensor, group: int) -> torch.Tensor:
    """Advantages (N,) of rewards by N rows and F functions, NaN where one gave none; 0 for a row without any, which
    counts in no other's rank."""
    weighted = rewards_NF * weights_F.to(rewards_NF)
    scored = ~rewards_NF.isnan().all(dim=1).view(-1, group)
    total = weighted.nansum(dim=1).view(-1, group)
    largest = weighted.abs().nansum(dim=1).view(-1, group).amax(dim=1)[:, None, None]
    apart = total[:, :, None] - total[:, None, :]
    counts = (apart.abs() > ROUNDING * (rewards_NF.shape[1] - 1) * largest) & scored[:, :, None] & scored[:, None, :]
    ranks = 0.5 * (apart.sign() * counts).sum(dim=2)
    spread = (ranks.square().sum(dim=1) / (scored.sum(dim=1) - 1).clamp(min=1)).sqrt()
    return (ranks / (spread[:, None] + 1e-4)).flatten()


def put_ranks_on(trainer: Any) -> None:
    """Let ranks take the place of a trainer's advantages in training: in the batch, and in the table of completions."""

    def score(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        output, logs = call_next(*args, **kwargs), trainer._logs
        if not trainer.model.training:
            return output
        rewards_FN = [logs["rewards"][name] for name in trainer.reward_func_names]  # of the generation, from all ranks
        ranked = rank_advantages(torch.tensor(rewards_FN).T, trainer.reward_weights, trainer.num_generations)
        logs["advantages"].extend(ranked.tolist())
        rows = len(output["advantages"])
        first = trainer.accelerator.process_index * rows
        return {**output, "advantages": ranked[first : first + rows].to(output["advantages"])}

    wrap_rows(trainer, [(find("score"), score)], INNER + 1)
