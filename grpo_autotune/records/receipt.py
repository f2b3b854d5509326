"""The receipt that a tuned configuration carries: what was measured, where, and what was changed for it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ChangedKnob(_Part):
    """One key that differs from the configuration the search began with."""

    key: str
    """Key path."""
    before: Any = None
    """Its value there (TRL's default where it was left out)."""
    after: Any = None
    """Its value here."""
    kind: Literal["exact", "learning"]
    """Whether the change leaves the mathematics of an optimizer step as it was."""
    proof: Literal["exact", "proven", "accepted", "unproven"]
    """Why it may be here: exact; a learning knob that measurements prove harmless; accepted by the user; or neither."""
    reward_difference: float | None = None
    """Mean reward with the change less that without, on the same prompts; null where it was not measured."""
    reward_low: float | None = None
    """Lower end of its interval."""
    reward_high: float | None = None
    """Upper end of its interval."""
    prompts_needed: int | None = None
    """Prompts that would settle an unproven change, if the difference stays as it was seen."""


class Receipt(_Part):
    """Measurements of this configuration by `grpo-autotune search`; `train` compares them with its own."""

    machine: str
    """Fingerprint of the hardware."""
    hardware: str
    """The same for people."""
    versions: dict[str, str] = {}
    """Versions of the packages."""
    runtime: dict[str, str] = {}
    """Of a GPU: driver, CUDA, cuDNN, NCCL, Triton, power limit, allocator, and the order of attention kernels; of a CPU
    its threads; of a model that several processes share: what each holds (`sharding`)."""
    processes: int = 1
    """Training processes that it was measured with."""
    step_s: float
    """Median seconds of an optimizer step."""
    step_s_low: float
    """Lower end of its interval."""
    step_s_high: float
    """Upper end of its interval."""
    steps: int
    """Steps it was measured on."""
    predicted_step_s: float | None = None
    """What the models said before it was measured."""
    baseline_step_s: float
    """Median seconds of a step of the configuration that the search began with."""
    speedup: float
    """Useful completions per second over those of that configuration."""
    speedup_low: float
    """Lower end of its interval."""
    speedup_high: float
    """Upper end of its interval."""
    raced: bool
    """Whether the two were measured in turns on the same prompts."""
    confidence: float
    """Confidence of the intervals."""
    living_share: float | None = None
    """Share of its completions that a step of `step_s` trains on, while `skip_dead` leaves out groups without a spread
    of rewards: with `living_s` the share that the probe's rewards let expect, else the mean over the measured steps."""
    living_s: float | None = None
    """Seconds by which a step that trains on all its completions is longer than one that trains on none, by the steps
    of this configuration or of the nearest; null without `skip_dead`, with several processes, and where nothing told
    it."""
    peak_bytes: int | None = None
    """Most memory it took."""
    worst_case: Literal["passed", "not run"] = "not run"
    """The step with the longest prompts, the largest images and full-length completions."""
    changed: list[ChangedKnob] = []
    """What differs from that configuration."""

    def seconds_at(self, share: float) -> float:
        """Seconds of a step that trains on such a share of its completions; `step_s` where nothing tells more."""
        if self.living_s is None or self.living_share is None:
            return self.step_s
        return self.step_s + (share - self.living_share) * self.living_s
