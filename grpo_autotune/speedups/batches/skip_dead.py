"""Rows that teach nothing are left out of the training pass; every denominator stays that of the whole micro batch.

With `beta = 0` and neither an entropy bonus nor a router loss, a row's loss is a product with its advantage: a row of
zero advantage, or whose completion is masked as a whole, adds nothing to loss or gradient. Whether a group is dead is
decided by its rewards' spread (max - min, at most the rounding of their sum): a mean of equal float32 rewards is off by
1e-8, which TRL divides by 1e-4 and trains on. Every rank must run one wrapped forward a micro step, so where nothing is
left it runs on two tokens of one row, times zero; on the whole prompt where all trained weights need that, and where
the weights are sharded, so that its images go through the tower as those of the other ranks do.

TRL's metrics of the loss then speak of the rows that are left, so they are logged as `living/<name>`.

Legend: B rows of this process, N rows of all processes, G generations a prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER, Next
from grpo_autotune.seams.loss import DIVISORS
from grpo_autotune.seams.ranks import sharded
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.rows import Batch, lengths, one_token, take
from grpo_autotune.speedups.conditions import GENERATION, LOSS, active_noise, in_parts

ROUNDING = 2.0 * torch.finfo(torch.float32).eps
"""What one more reward function may add to max - min of a group whose weighted sums are equal, relative to the sizes of
what is summed up. Equal rewards of one function are equal to the last bit."""

KEY = "dead_advantage"
"""Column of a batch: the advantage that TRL gave a row of a dead group, NaN for all others. A row whose advantage was
changed after scoring differs from it, and is trained on."""
LABEL = "living"
"""Prefix of the metrics of the rows that are left."""

TEXT_PARTS = ("language_model", "text_model", "lm_head")
"""Parts of a model's weights that a prompt without its images reaches; all others may belong to images."""


class SkipDead:
    """The speed-up."""

    name = "skip_dead"
    summary = "completions without a gradient are left out of the training pass"
    stands_for = (*GENERATION, *LOSS)

    def applies(self, trainer: Any) -> str | None:
        """None where a zero advantage means a zero gradient."""
        if trainer.beta != 0.0:
            return f"grpo.beta is {trainer.beta:g}: the KL term gives every completion a gradient"
        if trainer._entropy_bonus_enabled:
            return "grpo.entropy_coef or grpo.use_adaptive_entropy gives every completion a gradient"
        if trainer.aux_loss_enabled:
            return "grpo.router_aux_loss_coef gives every completion a gradient"
        if trainer.top_entropy_quantile < 1.0:
            return "grpo.top_entropy_quantile takes its threshold from all completions"
        if trainer.multi_objective_aggregation != "sum_then_normalize":
            return "grpo.multi_objective_aggregation couples the advantages of all groups"
        if trainer.loss_type not in DIVISORS:
            return f"grpo.loss_type {trainer.loss_type} is not known to give a zero advantage no gradient"
        if (reason := in_parts(trainer)) is not None:
            return reason
        noise = active_noise(trainer)
        return None if noise is None else f"{noise}: fewer rows would draw other random numbers"

    def install(self, trainer: Any) -> Installed:
        """Put layers on the rewards, the generation batch, the loss and the gathering of its metrics."""
        on = _Skipping(self.name, trainer)
        on.handles += wrap_seams(trainer, INNER, rewards=on.rewards, score=on.score, loss=on.loss, gather=on.gather)
        return on


def living_rows(rewards: torch.Tensor, weights: torch.Tensor, group: int) -> torch.Tensor:
    """Completions that have a reward, in a group (of G) whose rewards differ; boolean, shape (N,).

    Rewards have one column a function, whose weights those are, shape (N, functions), and are NaN where it has none."""
    scored_NG = ~torch.isnan(rewards).all(dim=1).view(-1, group)
    weighted = rewards * weights.to(rewards.device)
    total_NG = weighted.nansum(dim=1).view(-1, group)
    highest = total_NG.masked_fill(~scored_NG, -torch.inf).amax(dim=1)
    lowest = total_NG.masked_fill(~scored_NG, torch.inf).amin(dim=1)
    largest = weighted.abs().nansum(dim=1).view(-1, group).amax(dim=1)
    lives = highest - lowest > ROUNDING * (rewards.shape[1] - 1) * largest
    return (lives[:, None] & scored_NG).flatten()


class _Skipping(Installed):
    """Layers of one trainer, and what they left out."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        self._living_B: torch.Tensor | None = None
        self._left_out = 0
        self.counts = {"rows": 0.0, "skipped_rows": 0.0}  # that came to the training pass, and that were left out of it
        self._images_train = any(
            weight.requires_grad and not any(part in name for part in TEXT_PARTS)
            for name, weight in trainer.model.named_parameters()
        )

    def rewards(self, call_next: Next, /, inputs: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """Learn which groups have a spread; rewards come from all processes, in their order."""
        rewards = call_next(inputs, prompts, *args, **kwargs)
        trainer = self.trainer
        if trainer.model.training:
            living_N = living_rows(rewards, trainer.reward_weights, trainer.num_generations)
            first = trainer.accelerator.process_index * len(prompts)
            self._living_B = living_N[first : first + len(prompts)]
        return rewards

    def score(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """Let the batch carry it through TRL's shuffle and split."""
        self._living_B = None
        output = call_next(*args, **kwargs)
        if self._living_B is None:
            return output
        advantages = output["advantages"]
        living = self._living_B if advantages.ndim == 1 else self._living_B[:, None]
        return {**output, KEY: torch.where(living, torch.nan, advantages)}

    def loss(self, call_next: Next, /, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The micro batch's loss, computed on the rows that have one."""
        if self.fell_back or not self.trainer.model.training:
            return call_next(model, inputs, *args, **kwargs)
        kept = gradient_rows(inputs).nonzero().flatten().tolist()
        rows = len(inputs["completion_ids"])
        with _relabelled(self.trainer._metrics["train"], len(kept) / rows):
            loss = self._loss_of(kept, call_next, model, inputs, *args, **kwargs)
        self.counts["rows"] += rows
        self.counts["skipped_rows"] += rows - len(kept)
        return loss

    def _loss_of(self, kept: list[int], call_next: Next, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["completion_ids"])
        if len(kept) == rows:
            return call_next(model, inputs, *args, **kwargs)
        part = take(inputs, kept) if kept else self._stand_in(inputs)
        share = _share(self.trainer.loss_type, part, inputs) if kept else 0.0
        self._left_out = rows - len(part["completion_ids"])
        try:
            return call_next(model, part, *args, **kwargs) * share
        finally:
            self._left_out = 0

    def gather(self, call_next: Next, /, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL gathers a number per row for its metrics, and every rank must give as many: NaN, which they leave out."""
        if self._left_out and tensor.ndim == 1 and tensor.is_floating_point():
            tensor = torch.cat([tensor, tensor.new_full((self._left_out,), torch.nan)])
        return call_next(tensor, *args, **kwargs)

    def _stand_in(self, inputs: Batch) -> Batch:
        """One completion token after as little of a prompt as reaches every trained weight."""
        row = take(inputs, [int(lengths(inputs).argmin())])
        row["advantages"] = torch.zeros_like(row["advantages"])
        if self.trainer.tools:
            return row  # tools may have put images into the completion
        row["completion_mask"] = torch.ones_like(row["completion_mask"])
        reached = self._images_train or sharded(self.trainer)
        return one_token(row, whole_prompt="pixel_values" in row and reached)


def gradient_rows(batch: Batch) -> torch.Tensor:
    """Rows of a micro batch that have a gradient; boolean, shape (B,)."""
    advantages, dead = batch["advantages"], batch.get(KEY)
    trained = advantages != 0
    if dead is not None and dead.shape == advantages.shape:
        trained = trained & (advantages != dead)
    with_advantage_B = trained if trained.ndim == 1 else trained.any(dim=1)
    alive: torch.Tensor = with_advantage_B & _loss_mask(batch).any(dim=1)
    return alive


def _loss_mask(batch: Batch) -> torch.Tensor:
    mask: torch.Tensor = batch["completion_mask"]
    return mask if "tool_mask" not in batch else mask * batch["tool_mask"]


def _share(loss_type: str, part: Batch, whole: Batch) -> float | torch.Tensor:
    """The factor from the loss of `part` to that of `whole`: the quotient of TRL's divisors."""
    if DIVISORS[loss_type] == "generation tokens":
        return 1.0
    if DIVISORS[loss_type] == "rows":
        return len(part["completion_ids"]) / len(whole["completion_ids"])
    return _loss_mask(part).sum().clamp(min=1.0) / _loss_mask(whole).sum().clamp(min=1.0)


@contextmanager
def _relabelled(metrics: Any, share: float) -> Iterator[None]:
    """Inside it, what TRL adds to its metrics is filed under `living/`, beside the share of rows it was taken over."""
    counts = {name: len(values) for name, values in metrics.items()}
    yield
    for name in list(metrics):
        values, before = metrics[name], counts.get(name, 0)
        if len(values) > before:
            if share:
                metrics[f"{LABEL}/{name}"].extend(values[before:])
            del values[before:]
            if not values:
                del metrics[name]
    metrics[f"{LABEL}/share"].append(share)
