"""The rewards section of a configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from grpo_autotune.config.section import Section

OnFailure = Literal["group_mean", "drop", "stop"]
"""Fill a score that failed with the mean of its group's others, leave its row out of training, or end the run."""


class RewardItem(Section):
    """One reward function."""

    name: str
    """Registered name, or `package.module:function`."""
    label: str | None = None
    """Name in logs and in `branches`; by default that of the function, with `_2` behind a second one."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum."""
    params: dict[str, Any] = {}
    """Keyword arguments of the function."""
    concurrency: int | None = Field(default=None, ge=1)
    """Calls at once of `judge` and `service`, over all ranks; by default it adapts to what the endpoint bears."""
    deadline_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Longest an async reward may take for a batch, in seconds, its queue included; what is missing then has failed."""
    on_failure: OnFailure | None = None
    """What becomes of scores that an async reward could not give: `group_mean` fills in the mean of the group's others,
    which adds nothing to the row's advantage, `drop` leaves the row out, `stop` saves a checkpoint and ends the run."""
