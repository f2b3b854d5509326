"""Rewards without training: the trainer's own path generates for the data's first prompts and computes their rewards.

The log-probabilities that this path computes for the loss are left out.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.trial import PromptReward
from grpo_autotune.seams.layers import INNER, Next, take_off
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import end_tokens
from grpo_autotune.trials.heartbeat import HeartbeatWriter


def measure_rewards(trainer: Any, batches: int, heartbeat: HeartbeatWriter) -> tuple[list[float], list[PromptReward]]:
    """Generate `batches` generation batches, fewer where the data set ends before, and compute their rewards: seconds
    of each batch, and the rewards of each prompt, in the data set's order. The heartbeat beats before each batch and
    its rewards. ConfigError where the data set is streamed."""
    group = trainer.num_generations
    prompts = trainer.args.generation_batch_size // group
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ConfigError("a streamed data set has no numbered prompts to compare rewards on", where="train_dataset")
    batches = max(1, min(batches, len(trainer.train_dataset) // prompts))
    samples = _Samples(trainer, heartbeat)
    trainer.model.train()
    heartbeat.of = batches
    heartbeat.begin()
    seconds, rewards = [], []
    try:
        for batch in range(batches):
            heartbeat.beat("generation")
            begin = time.perf_counter()
            rows = range(batch * prompts, (batch + 1) * prompts)
            with torch.no_grad():
                trainer._generate_and_score_completions(_share(trainer, [row for row in rows for _ in range(group)]))
            seconds.append(time.perf_counter() - begin)
            rewards += samples.by_prompt(rows, group)
            heartbeat.step = batch + 1
    finally:
        samples.remove()
    return seconds, rewards


def _share(trainer: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """This rank's part of a generation batch, as the sampler hands it out."""
    size, rank = len(rows) // trainer.accelerator.num_processes, trainer.accelerator.process_index
    return [trainer.train_dataset[row] for row in rows[rank * size : (rank + 1) * size]]


class _Samples:
    """Rewards of the newest generation, over all ranks."""

    def __init__(self, trainer: Any, heartbeat: HeartbeatWriter) -> None:
        self._trainer, self._heartbeat = trainer, heartbeat
        self._rewards: list[float] = []
        self._truncated: list[bool] = []
        layers = {"rewards": self._total, "rollout": self._rollout, "logps": self._no_logps}
        self._handles = wrap_seams(trainer, INNER, **layers)

    def remove(self) -> None:
        take_off(self._handles)

    def by_prompt(self, rows: range, group: int) -> list[PromptReward]:
        answers = list(zip(self._rewards, self._truncated, strict=True))
        groups = [answers[at : at + group] for at in range(0, len(rows) * group, group)]
        scored = [[(reward, cut) for reward, cut in part if reward == reward] for part in groups]
        return [
            PromptReward(prompt=row, rewards=[reward for reward, _ in part], truncated=sum(cut for _, cut in part))
            for row, part in zip(rows, scored, strict=True)
        ]

    def _total(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with self._heartbeat.within("reward"):
            rewards_BF = call_next(*args, **kwargs)
        weights_F = self._trainer.reward_weights.to(rewards_BF.device)
        has_none_B = rewards_BF.isnan().all(dim=1)
        self._rewards = (rewards_BF * weights_F).nansum(dim=1).masked_fill(has_none_B, torch.nan).tolist()
        return rewards_BF

    def _rollout(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        rollout = call_next(*args, **kwargs)
        tokenizer = getattr(self._trainer.processing_class, "tokenizer", self._trainer.processing_class)
        ends = {*end_tokens(self._trainer), tokenizer.pad_token_id}
        self._truncated = gather_object([not ids or ids[-1] not in ends for ids in rollout[1]])
        return rollout

    def _no_logps(
        self, call_next: Next, /, model: Any, ids_BT: Any, mask_BT: Any, keep: int, *_: Any, **__: Any
    ) -> Any:
        return torch.zeros(len(ids_BT), keep, device=ids_BT.device), None, None
