"""Measures of a row of the table of evaluations that TRL does not log, put on a trainer and logged with its metrics.

`adv_std` and `adv_max`: standard deviation and maximum of the advantages of a generation, over all ranks. Of an
evaluation alone: `reward_ci`, half of the 95 % interval of the mean reward (t over the means of prompts), `beta`, and
`ppo_loss`, the loss without its KL term.

TRL's losses are linear in the KL term, whatever the loss type: `loss = policy + sum of weight * kl`. So the derivative
of the loss by a factor of that term, 1, is the term's part of the loss; autograd follows from the term on.
"""

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.records.evaluations import half_interval
from grpo_autotune.seams.layers import INNER, AttributeSlot, wrap
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.train.branches.control import KlWeight


class Measures:
    """The layers on one trainer. Legend: N rows of all ranks, F reward functions."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._kl_terms: list[torch.Tensor] = []
        self._prompt_means: list[float] = []
        outside = [(find("score"), self._score), (find("rewards"), self._rewards)]
        wrap_rows(trainer, outside, INNER - 2)  # around those that change advantages, or fill in what failed
        wrap_rows(trainer, [(find("loss"), self._loss)], INNER + 2)  # inside of branches, which weigh the KL term
        wrap(AttributeSlot(trainer, "evaluation_loop"), self._loop, INNER)
        wrap(AttributeSlot(trainer, "evaluate"), self._evaluate)

    def _score(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        output = call_next(*args, **kwargs)
        trainer = self._trainer
        advantages_N = trainer.accelerator.gather(output["advantages"]).float()
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        metrics["adv_std"].append(advantages_N.std(correction=0).item())
        metrics["adv_max"].append(advantages_N.max().item())
        return output

    def _rewards(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        trainer, rewards_NF = self._trainer, call_next(*args, **kwargs)
        if not trainer.model.training:
            total_N = (rewards_NF * trainer.reward_weights.to(rewards_NF)).nansum(dim=1)
            total_N[rewards_NF.isnan().all(dim=1)] = torch.nan
            self._prompt_means += total_N.view(-1, trainer.num_generations_eval).nanmean(dim=1).tolist()
        return rewards_NF

    def _loss(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        trainer, beta = self._trainer, self._trainer.beta
        if trainer.model.training or beta == 0.0:
            return call_next(*args, **kwargs)
        factor = torch.ones((), device=trainer.accelerator.device, requires_grad=True)

        def weighted(kl_BT: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(True)
            kl_term_BT: torch.Tensor = factor * (beta * kl_BT)
            return kl_term_BT

        trainer.beta = KlWeight(beta)
        trainer.beta.product = weighted
        try:
            with torch.no_grad():  # and as it was, afterwards
                loss = call_next(*args, **kwargs)
        finally:
            trainer.beta = beta
        kl_term = torch.autograd.grad(loss, factor)[0]
        repeated = kl_term.repeat(trainer.args.eval_batch_size)  # as transformers weighs the loss
        self._kl_terms.append(trainer.gather_function(repeated))
        return loss.detach()

    def _loop(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._kl_terms = []
        output = call_next(*args, **kwargs)
        for key in [key for key in output.metrics if key.endswith("_loss")]:
            kl_term = torch.cat(self._kl_terms).mean().item() if self._kl_terms else 0.0
            output.metrics[f"{key.removesuffix('loss')}ppo_loss"] = output.metrics[key] - kl_term
        metrics = self._trainer._metrics["eval"]
        metrics["reward_ci"] = [half_interval(self._prompt_means)]
        if not any(key.startswith("branch/") for key in metrics):  # which log their own
            metrics["beta"] = [float(self._trainer.beta)]
        return output

    def _evaluate(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._prompt_means = []
        return call_next(*args, **kwargs)
