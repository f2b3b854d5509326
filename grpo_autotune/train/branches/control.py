"""Branches on a trainer: the KL term weighted row by row, KL measured by branch, and weights kept to their bands.

TRL 1.16 adds `self.beta * per_token_kl` to the loss (`_compute_loss`). While a loss is computed, `beta` is a number
whose product with that tensor takes each row by its branch's weight, and measures KL on the way. The branch of a row is
carried in the generation batch, through shuffle and split, as `group_id` is.

Legend: B rows of this process, N of all processes, T completion tokens, F reward functions, n branches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_autotune.config.sections.branches import Branches, start_weights
from grpo_autotune.seams.layers import INNER
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.seams.trainer_access import end_tokens

KEY = "branch"  # column of a generation batch: the number of each row's branch, (B,)


def adapted(beta: float, start: float, kl: float, band: Sequence[float], factor: float) -> float:
    """The next weight: divided by `factor` where KL is above the band, multiplied below; a tenth to ten `start`s."""
    after = beta / factor if kl > band[1] else beta * factor if kl < band[0] else beta
    return min(max(after, start / 10.0), start * 10.0)


class KlWeight(float):
    """The trainer's `beta` while it computes a loss: a number like any other but for its product with the KL term."""

    product: Callable[[Any], Any]

    def __mul__(self, kl_BT: Any) -> Any:
        return self.product(kl_BT)


class BranchControl(TrainerCallback):  # type: ignore[misc]
    """The branches of one trainer, whose rows were checked (`rows.divided`). What the next step depends on is kept in
    `trainer.carried`, for checkpoints, under the weights at the start: a run with others begins with its own."""

    def __init__(self, trainer: Any, branches: Branches, grpo: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._trainer, self._branches, self._say = trainer, branches, say
        self._start = start_weights(branches, grpo)
        self._names, self._key = list(self._start), f"branches {self._start}"
        sums = {mode: torch.zeros(2, len(self._start), device=trainer.accelerator.device) for mode in ("train", "eval")}
        kept = {"beta": dict(self._start), "since": [[0.0, 0.0]] * len(self._start), **sums}  # sums of KL and of tokens
        vars(trainer).setdefault("carried", {})[self._key] = kept
        wrap_rows(trainer, [(find("score"), self._score), (find("loss"), self._loss)], INNER + 1)
        wrap_rows(trainer, [(find("rewards"), self._rewards)], INNER - 1)  # around those that fill in what failed
        trainer.add_callback(self)

    def _of_rows(self, rows: Any) -> torch.Tensor:
        column = self._branches.column
        numbers = [0 if column is None else self._names.index(str(row[column])) for row in rows]
        return torch.tensor(numbers, device=self._trainer.accelerator.device)

    def _score(self, call_next: Callable[..., Any], /, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return {**call_next(inputs, *args, **kwargs), KEY: self._of_rows(inputs)}

    def _rewards(self, call_next: Callable[..., Any], /, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Log each branch's mean weighted reward, and length and truncation of its completions as TRL counts them."""
        trainer, completion_ids = self._trainer, args[2]
        rewards_NF = call_next(inputs, *args, **kwargs)
        total_N = (rewards_NF * trainer.reward_weights.to(rewards_NF.device)).nansum(dim=1)
        total_N[rewards_NF.isnan().all(dim=1)] = torch.nan
        ends = {*end_tokens(trainer), trainer._tokenizer.pad_token_id}
        facts_B2 = torch.tensor([[len(ids), not ids or ids[-1] not in ends] for ids in completion_ids])
        numbers_B = self._of_rows(inputs)
        facts_N3 = trainer.accelerator.gather(torch.cat([facts_B2.to(numbers_B), numbers_B[:, None]], dim=1))
        for number in facts_N3[:, 2].unique().tolist():
            mine = facts_N3[:, 2] == number
            length, cut = facts_N3[mine, :2].float().mean(dim=0).tolist()
            self._log(self._names[number], reward=total_N[mine].nanmean().item(), length=length, truncated=cut)
        return rewards_NF

    def _loss(self, call_next: Callable[..., Any], /, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, beta = self._trainer, self._trainer.beta
        trainer.beta = by_row = KlWeight(beta)
        by_row.product = partial(self._weighted, inputs)
        try:
            return call_next(model, inputs, *args, **kwargs)
        finally:
            trainer.beta = beta

    def _weighted(self, inputs: Mapping[str, Any], kl_BT: torch.Tensor) -> torch.Tensor:
        """The KL term by each row's weight, rounded as a product with a number is; it is added to its branch's sums."""
        kept, numbers_B = self._trainer.carried[self._key], inputs[KEY]
        mask_BT = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        sums_2B = torch.stack([(kl_BT.detach() * mask_BT).sum(dim=1), mask_BT.sum(dim=1)])
        kept[self._mode].index_add_(1, numbers_B, sums_2B.float())
        wide = torch.promote_types(kl_BT.dtype, torch.float32)
        weights_B = torch.tensor([*kept["beta"].values()], dtype=wide, device=kl_BT.device)[numbers_B]
        return (weights_B[:, None] * kl_BT).to(kl_BT.dtype)

    @property
    def _mode(self) -> str:
        return "train" if self._trainer.model.training else "eval"

    def _log(self, name: str, **numbers: float) -> None:
        for key, number in numbers.items():
            self._trainer._metrics[self._mode][f"branch/{name}/{key}"].append(number)

    def flush(self) -> list[list[float]]:
        """Log each branch's mean KL since the last call, over all ranks; the sums of KL and of tokens."""
        sums_2n = self._trainer.carried[self._key][self._mode]
        sums: list[list[float]] = self._trainer.accelerator.reduce(sums_2n.clone(), reduction="sum").T.tolist()
        sums_2n.zero_()
        for name, (kl, tokens) in zip(self._start, sums, strict=True):
            if tokens:
                self._log(name, kl=kl / tokens)
        return sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept, rule = self._trainer.carried[self._key], self._branches.control
        kept["since"] = [[a + c, b + d] for (a, b), (c, d) in zip(kept["since"], self.flush(), strict=True)]
        for name, beta in kept["beta"].items():
            self._log(name, beta=beta)
        if rule is None or state.global_step % rule.every:
            return
        for (name, branch), (kl, tokens) in zip(self._branches.by_name.items(), kept["since"], strict=True):
            if branch.kl_band is not None and tokens:
                mean, (low, high), beta = kl / tokens, branch.kl_band, kept["beta"][name]
                kept["beta"][name] = adapted(beta, self._start[name], mean, branch.kl_band, rule.factor)
                if not math.isclose(kept["beta"][name], beta):
                    side, after = "above" if mean > high else "below", kept["beta"][name]
                    told = f"is {mean:.3g} nats per token, {side} {low:g} to {high:g}: beta {beta:.3g} -> {after:.3g}"
                    self._say(f"step {state.global_step}: KL of branch {name} {told}")
        kept["since"] = [[0.0, 0.0]] * len(self._start)
