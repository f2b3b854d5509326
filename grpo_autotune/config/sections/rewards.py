"""The rewards section of a configuration."""

from typing import Any, Literal

from pydantic import Field, model_validator

from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError

OnFailure = Literal["group_mean", "drop", "stop"]
"""Fill a score that failed with the mean of its group's others, leave its row out of training, or end the run."""

CALL_KEYS = ("concurrency", "deadline_s", "on_failure")
"""Keys for async rewards."""


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

    @model_validator(mode="before")
    @classmethod
    def _beside_params(cls, given: Any) -> Any:
        """`judge` and `service` take the keys of calls inside `params`, too."""
        params = given.get("params") if isinstance(given, dict) and given.get("name") in ("judge", "service") else None
        if not isinstance(params, dict):
            return given
        inside = {key: params[key] for key in CALL_KEYS if key in params}
        for key in inside:
            if given.get(key) is not None:
                raise ConfigError("this is given twice, inside params and beside it", where=f"rewards[].{key}")
        return {**given, **inside, "params": {key: value for key, value in params.items() if key not in inside}}
