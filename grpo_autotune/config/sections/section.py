"""The base of every section of a configuration."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: immutable, unknown keys fail, and no value is converted to another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), defer_build=True)


class OutputSection(Section):
    """The folder of a run."""

    dir: str | None = None
    """Run folder; `runs/<name>` by default."""
    name: str | None = None
    """Name of the run; the configuration file's name by default."""


class SearchSection(Section):
    """Limits of `grpo-autotune search`: what it may change, and what it must prove."""

    knobs: dict[str, list[Any] | None] = {}
    """Knob (a key path such as `data.image_size`) -> the values it may take; null takes a knob out of the search."""
    accept: list[str] = []
    """Knobs that change what is learned and may enter `tuned.yaml` although the measurements do not prove them."""
    max_reward_drop: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    """Largest loss of mean reward that a knob which changes what is learned may cost."""
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    """Confidence of every interval, and of the test against `max_reward_drop`."""
    allow_longer_run: bool = False
    """Whether the predicted wall time of the configured run may rise for more useful completions per second."""
    steps: int = Field(default=3, ge=1)
    """Optimizer steps that a trial measures at first; more where intervals overlap."""
    trial_limit_s: float | None = Field(default=None, gt=0)
    """Longest a trial may run, in seconds; by default what the models predict for it, with a margin."""
    seed: int = Field(default=0, ge=0)
    """Seed of the search itself; trials keep `grpo.seed`."""
