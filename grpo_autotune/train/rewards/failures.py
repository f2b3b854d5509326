"""Scores that could not be had: what takes their place, by `on_failure`, once TRL has gathered those of all ranks.

TRL counts the missing reward of a row that has others as 0. A failed score is never that: it becomes the mean of its
group's others, which adds nothing to the row's advantage, or the row has no reward at all and so no advantage.
"""

from collections.abc import Mapping
from typing import Any

import torch

from grpo_autotune.config.sections.rewards import OnFailure
from grpo_autotune.errors import RewardError
from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.replies import close_in

INNERMOST = INNER + 10
"""Below every speed-up and the probe: none of them sees a failed score."""


def settle(
    rewards_NF: torch.Tensor, group: int, policies: Mapping[int, OnFailure]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards without failed scores, and which had failed; both of shape (N, functions).

    Args:
        rewards_NF: Rewards of all ranks, groups of `group` rows one after another.
        group: G.
        policies: Of the functions that have one, by column. `group_mean` fills in the mean of the group's scores; the
            rows of a group that has none lose all their rewards, as failed rows do with `drop` and `stop`."""
    columns = range(rewards_NF.shape[1])
    asked_F = torch.tensor([column in policies for column in columns], device=rewards_NF.device)
    filled_F = torch.tensor([policies.get(column) == "group_mean" for column in columns], device=rewards_NF.device)
    failed_NF = (rewards_NF == FAILED) & asked_F
    settled_NF = rewards_NF.masked_fill(failed_NF, torch.nan)
    mean_NF = settled_NF.view(-1, group, settled_NF.shape[1]).nanmean(dim=1).repeat_interleave(group, dim=0)
    settled_NF = torch.where(failed_NF & filled_F, mean_NF, settled_NF)
    is_out_N = (failed_NF & settled_NF.isnan()).any(dim=1)
    return settled_NF.masked_fill(is_out_N[:, None], torch.nan), failed_NF


def attend(trainer: Any) -> None:
    """Settle failed scores of the trainer's functions that carry `on_failure`, and close what its rewards opened."""
    policies = {
        column: function.on_failure
        for column, function in enumerate(trainer.reward_funcs)
        if getattr(function, "on_failure", None)
    }
    attendant = _Attendant(trainer, policies)
    wrap(AttributeSlot(trainer, "train"), attendant.train)
    if policies:
        wrap_seams(trainer, INNERMOST, rewards=attendant.rewards)


class _Attendant:
    """Layers of one trainer, and the failure that ends its run."""

    def __init__(self, trainer: Any, policies: Mapping[int, OnFailure]) -> None:
        self._trainer, self._policies = trainer, policies
        self._end: RewardError | None = None

    def rewards(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        mode = "train" if trainer.model.training else "eval"
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        rewards_NF, failed_NF = settle(call_next(*args, **kwargs), group, self._policies)
        for column, policy in self._policies.items():
            name, count = trainer.reward_func_names[column], int(failed_NF[:, column].sum())
            trainer._metrics[mode][f"rewards/{name}/failed"].append(count / len(failed_NF))
            if policy == "stop" and count:
                self._end = RewardError(
                    f"{count} of {len(failed_NF)} scores failed, and on_failure is stop",
                    where=f"reward {name}, step {trainer.state.global_step + 1}",
                    fix="The step was saved without these rows: go on with --resume once its endpoint answers",
                )
        trainer.must_end = self._end is not None
        return rewards_NF

    def train(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        try:
            result = call_next(*args, **kwargs)
        finally:
            close_in(getattr(self._trainer, "async_loop", None))
        if self._end is not None:
            raise self._end
        return result
