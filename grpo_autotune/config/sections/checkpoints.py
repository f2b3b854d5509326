"""The `checkpoints` section: the best checkpoint, and how it is chosen while training."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError

OTHER_CHOOSERS = ("metric_for_best_model", "load_best_model_at_end", "greater_is_better")


class CheckpointsSection(Section):
    """The best checkpoint: saved when an evaluation finds it, kept while it is the best, and linked to as `best`."""

    choose: str | None = None
    """`val_loss`, `ppo_loss`, `kl`, `adv_std`, `reward`, or any name that is logged (`rewards/format/mean`: held out
    where an evaluation has it). By default nothing is saved for it, and `best` links to the highest held-out reward."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether the lowest or the highest is the best; `auto` knows losses, KL and rewards."""
    kl_band: list[float] = Field(default=[0.01, 0.1], min_length=2, max_length=2)
    """For `choose: kl`, `[low, high]` in nats per token: the best has a held-out KL inside, and then most reward."""

    @model_validator(mode="after")
    def _band_is_one(self) -> Self:
        low, high = self.kl_band
        if not (0 <= low < high and math.isfinite(high)):
            raise ConfigError("low and high, 0 or more, low first", where="checkpoints.kl_band")
        return self


def check_choice(checkpoints: CheckpointsSection, grpo: Mapping[str, Any], *, evaluates: bool, has_kl: bool) -> None:
    """Refuse a choice for which nothing is measured, and one beside transformers' own."""
    where = "checkpoints.choose"
    if checkpoints.choose is None:
        return
    for key in OTHER_CHOOSERS:
        if grpo.get(key) not in (None, False):
            raise ConfigError(f"grpo.{key} chooses a checkpoint already", where=where, fix="Remove one of the two.")
    if grpo.get("save_strategy") == "best":
        raise ConfigError("grpo.save_strategy best chooses already", where=where, fix="Set it to no, steps or epoch.")
    if not evaluates:
        fix = "Set grpo.eval_strategy, and data.eval_split, data.eval_path or data.eval."
        raise ConfigError("nothing is evaluated, so nothing can be chosen", where=where, fix=fix)
    if checkpoints.choose in ("kl", "eval_kl") and not has_kl:
        raise ConfigError("no KL is measured with grpo.beta 0", where=where, fix="Set grpo.beta above 0.")
