"""The sections that say what is sampled beside TRL's own way: prompts drawn again, and evaluation's own settings."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError, nearest_hint


class Resample(Section):
    """Dynamic sampling, as in DAPO: a zero-advantage group teaches nothing, and before training a group of a further
    prompt takes its place."""

    max_rounds: int = Field(default=10, ge=2)
    """Generations for one rollout at most, the first included, each of as many prompts as a rollout has. Groups that
    are equal then stay."""
    reward: str | None = None
    """Label or name of the reward that decides if a group is equal; by default the weighted sum of all."""


class EvalSampling(Section):
    """Sampling of evaluation, where it is not that of training. A key left out is as in `grpo`; the number of
    completions of a prompt is `grpo.num_generations_eval`."""

    temperature: float | None = None
    """0 is greedy: the most likely token each time."""
    top_p: float | None = None
    """Share of the probability that is sampled from."""
    top_k: int | None = None
    """Number of tokens that are sampled from; 0 is all."""
    min_p: float | None = None
    """Least probability, against the most likely token's."""
    repetition_penalty: float | None = None
    """Above 1: tokens that were there before become less likely."""


def check_resample(resample: Resample, rewards: Sequence[RewardItem], branches: Any) -> None:
    """ConfigError for a reward that there is not, or beside branches, whose shares of the prompts would change."""
    known = [item.label or re.split("[:.]", item.name)[-1] for item in rewards]
    if resample.reward is not None and resample.reward not in known:
        fix = nearest_hint(resample.reward, known, f"There are {', '.join(known)}.")
        raise ConfigError(f"no reward has the label or name {resample.reward!r}", where="resample.reward", fix=fix)
    if branches is not None:
        raise ConfigError("it would change the branches' shares of the prompts", where="resample", fix="Remove it.")
