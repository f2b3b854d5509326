"""The types of `report.json`. Times are seconds, sizes bytes, shares 0 to 1; `docs/report.md` explains every key."""

from typing import Any, Literal

from pydantic import Field

from grpo_autotune.records.alerts import Alert
from grpo_autotune.records.base import Document, Frozen
from grpo_autotune.records.evaluations import Evaluation
from grpo_autotune.records.probe import (
    ImageFacts,
    OtherLoad,
    Phase,
    ProfiledStep,
    ResampleFacts,
    RewardCall,
    TokenFacts,
    TrainerFacts,
    Utilisation,
)
from grpo_autotune.records.rewards import RemoteCalls
from grpo_autotune.records.rollout import EngineFacts, Fidelity

Kind = Literal["exact", "learning"]


class Change(Frozen):
    """One key of the configuration: its value (None: unknown to the probe) and the value it should have."""

    key: str
    before: Any
    after: Any


class Advice(Frozen):
    """One entry of the verdict, most saving first."""

    text: str  # the whole advice as text
    kind: Kind  # `exact` leaves the mathematics of an optimizer step alone, `learning` changes what is learned
    # seconds of an optimizer step; None where the advice saves none but makes the step worth more
    predicted_saving: float | None
    predicted_share: float | None  # the same as a share of the step
    # Amdahl's: how many times faster the step would be if the stages concerned took no time at all
    ceiling: float | None
    stages: list[str]  # the stages concerned
    changes: list[Change]  # keys to set; empty where no key does it


class PartRow(Frozen):
    """A part of a stage: seconds scaled as the stage's are, and its share of the step."""

    name: str
    self_s: float
    share: float


class StageReport(Frozen):
    """One stage of the step; `self_s` sums to `step_s` over the stages."""

    name: str  # stage, as in `grpo_autotune.records.probe.STAGES`
    self_s: float  # `share * step_s`
    mean_s: float  # plain mean over the measured steps (over whole cycles of them)
    host_s: float | None  # mean host seconds where `self_s` is the GPU's; None on a CPU
    share: float  # the stage's part of all measured seconds
    spread: float  # half the interquartile range over steps, seconds
    per_step_s: list[float] = []  # seconds of each measured step, to 1 µs; empty where it never ran
    # milliseconds per token of this rank: completion tokens for `generation`; tokens of prompt and completion trained
    # on (`num_iterations` times those generated) for `policy_logprob`, `backward` and `optimizer`; tokens of prompt and
    # completion generated elsewhere
    ms_per_token: float | None
    # time that this machine's ceiling would allow over time taken; None where it is not known
    limit_share: float | None
    limited_by: Literal["matrix", "memory"] | None  # the ceiling that binds
    peak_bytes: int | None  # most memory while the stage ran
    hidden_s: float  # mean seconds per step on other threads while the main thread did something else
    calls: float  # mean number of calls per step
    parts: list[PartRow]  # the stage split up, where the probe can tell parts apart
    seams: list[str]  # the functions whose time this stage holds
    utilisation: Utilisation | None  # means of the samples taken while the stage ran; None without a sample


class Rates(Frozen):
    """Work per second over all ranks."""

    tokens_per_s: float  # prompt and completion tokens, each completion's copy of the prompt counted
    completion_tokens_per_s: float  # completion tokens alone
    # sum over groups of G - 1 where the rewards differ (masked truncated completions left out) over seconds; None where
    # no rewards were seen
    useful_completions_per_s: float | None
    useless: str | None = None  # why it is zero; None where it is not


class RankStage(Frozen):
    """Seconds per step of one stage (`step` for the whole step) over the ranks."""

    name: str
    mean_s: float
    slowest_s: float
    slowest_rank: int


class RankRow(Frozen):
    """Seconds per step of one rank: its own work, and its part in collectives, others' lateness included."""

    rank: int
    step_s: float
    compute_s: float
    wait_s: float


class Straggler(Frozen):
    """A rank that works `extra_s` per step longer than the mean of the others, most of it in `stage`."""

    rank: int
    extra_s: float
    stage: str
    others_wait_s: float = 0.0  # seconds per step that each of the others waits longer than it, in the mean


class Ranks(Frozen):
    """All ranks side by side."""

    world_size: int
    stages: list[RankStage]
    rows: list[RankRow] = []
    stragglers: list[Straggler]


class Report(Document):
    """The report of one probe; `docs/report.md` explains every key."""

    schema_: Literal["grpo-autotune/report/1"] = Field(default="grpo-autotune/report/1", alias="schema")
    step_s: float
    step_spread_s: float
    steps: list[int]
    step_seconds: list[float]
    living_shares: list[float] = []
    warmup_s: list[float]
    cycle: int = Field(ge=1)
    slowest: float | None = None
    slow_steps: int | None = None
    stages: list[StageReport]
    bound: str
    verdict: list[Advice]
    warnings: list[str]
    fidelity: Fidelity | None
    engine: EngineFacts | None = None
    startup: list[Phase]
    images: ImageFacts | None
    resample: ResampleFacts | None = None
    tokens: TokenFacts | None
    profiled: ProfiledStep | None = None
    others: OtherLoad | None = None
    occasions: dict[str, float] = {}  # seconds of one `evaluate` and one `save`, where they were measured
    rates: Rates | None
    rewards: list[RewardCall]
    remote: list[RemoteCalls] = []  # of rewards over a network
    weight_sync_bytes: int | None
    rank: int
    ranks: Ranks | None
    metrics: dict[str, float]
    trainer: TrainerFacts
    machine: dict[str, Any] | None
    config: dict[str, Any] | None
    versions: dict[str, str]
    runtime: dict[str, str] = {}
    monitors: int | None = None
    alerts: list[Alert] = []
    evaluations: list[Evaluation] = []

    def stage(self, name: str) -> StageReport:
        """The row of one stage."""
        return next(row for row in self.stages if row.name == name)
