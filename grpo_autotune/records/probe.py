"""The records of a probe: frozen, free of torch, and equal after a trip through JSON.

Times are seconds, sizes bytes. A *measured step* is an optimizer step after the warm-up; lists with one entry per
step are in step order.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_autotune.records.base import Frozen
from grpo_autotune.records.rewards import RemoteCalls
from grpo_autotune.records.rollout import EngineFacts, Fidelity
from grpo_autotune.units import plural

STAGE_WORDS = {
    "generation": "generation",
    "policy_logprob": "the policy's log-probs",
    "reference_logprob": "the reference model's log-probs",
    "reward": "scoring by rewards",
    "backward": "the backward pass",
    "data": "data loading",
    "prompt": "prompt processing",
    "tools": "running tools and environments",
    "weight_sync": "pushing weights to vLLM",
    "engine": "vLLM's sleep and wake-up",
    "sync_wait": "waiting for other ranks",
    "optimizer": "the optimizer",
    "log_save_eval": "logging, saving and evaluating",
    "other": "what no stage accounts for",
}
"""Stage of an optimizer step -> its name in a sentence."""

STAGES = tuple(STAGE_WORDS)

NO_SIGNAL = {
    "masked": "all completions were cut off and masked: raise max_completion_length or drop mask_truncated_completions",
    "failed": "most scores failed: look at the endpoint of the judge or service, at its limits and its log",
    "equal": "each group's rewards were equal: check the rewards, or take prompts that the model solves now and then",
    "zero": "the gradient was zero: check which weights are trained, and which tokens masks and loss leave of them",
}
"""Cause of a step without a learning signal -> what was seen, and what to do."""

TRAINED = ("policy_logprob", "backward")
"""Stages that rows without a gradient are left out of, but for the part `old_policy` of the first."""

SAVES_NOTHING = "save_strategy best saves after an evaluation, and eval_strategy is no: set one of them to steps"


class StageRow(Frozen):
    """One stage of the step."""

    name: str  # one of `STAGES`
    per_step_s: list[float]  # self time of each measured step: the device's timeline on CUDA, the host clock elsewhere
    host_s: list[float] | None = None  # host self time beside it; None where `per_step_s` already is the host's
    # mean seconds per step of this stage's work on other threads while the main thread did something else
    hidden_s: float = 0.0
    # self time of each measured step by part (`policy_logprob`: `old_policy` and `training_forward`; `log_save_eval`:
    # `log`, `save`, `evaluate`)
    parts: dict[str, list[float]] = {}
    calls: float = 0.0  # mean number of spans per step
    seams: list[str] = []  # the functions whose time this stage holds
    # most memory seen while the stage ran (CUDA allocator, or resident set on CPU); None if it never ran
    peak_bytes: int | None = None


class StageTimings(Frozen):
    """Stages of the measured steps; for each step the stages' `per_step_s` sum to its `step_s`."""

    steps: list[int]  # global step numbers of the measured steps
    step_s: list[float]  # seconds of each, from the end of the last step's logging to the end of its own
    warmup_s: list[float] = []  # seconds of the steps before them
    stages: list[StageRow]  # one row per stage, in the order of `STAGES`, those that never ran included
    # number of optimizer steps after which the pattern of generating and reusing repeats (1 in most runs)
    cycle: int = 1


def cycle_means(values: Sequence[float], cycle: int) -> list[float]:
    """Mean of each whole cycle of `values`; the values themselves where there is no whole cycle. Any `cycle` steps in a
    row hold each kind of step once, so it does not matter where the first cycle begins."""
    whole = len(values) - len(values) % cycle
    return [math.fsum(values[at : at + cycle]) / cycle for at in range(0, whole, cycle)] or list(values)


LEAST_OCCASION_S = 1e-3


class Spread(Frozen):
    """Summary of a set of numbers."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class TokenFacts(Frozen):
    """Token counts and rewards of the measured generations, over all ranks of this process's batches."""

    prompt: Spread  # prompt lengths in tokens, image tokens included
    completion: Spread  # completion lengths in tokens
    prompt_per_step: float  # prompt tokens per optimizer step (each completion's copy counted)
    completion_per_step: float  # completion tokens per optimizer step
    padding_share: float  # share of the log-prob passes' token grid that is padding, 0 to 1
    truncated_share: float  # share of completions that end without an end-of-sequence token
    groups: int  # groups whose rewards were seen
    dead_groups: int  # those whose rewards are all equal (max - min at most 1e-6)
    pass_rates: list[float]  # for each group, the share of completions whose first reward is at least 0.5
    reward_mean: float  # mean weighted reward


class ResampleFacts(Frozen):
    """Dynamic sampling since the run began, warm-up included."""

    rollouts: int = 0
    rounds: int = 0  # generations for them, the first of each included
    groups: int = 0  # groups of a rollout, over all ranks, and of a generation
    dead_groups: int = 0  # groups of equal rewards that stayed, in all rollouts
    further_s: float = 0.0  # seconds of the generations after the first, their rewards included


class ImageFacts(Frozen):
    """Images of the measured generations."""

    pixels: Spread  # width times height as the trainer receives them
    per_prompt: float  # mean images per prompt
    tokens: Spread | None  # language-model tokens per image now; None where the processor gives no patch grid
    # the same if the longest side were so many pixels (keys "384", "512", "768", "1024"), aspect kept; empty where the
    # processor cannot tell
    tokens_at: dict[str, float]
    distinct_per_step: float  # distinct images per optimizer step
    decodes_per_image: float  # decodings per distinct image and step in this process (without those of loader workers)
    processings_per_image: float  # runs of the image processor per distinct image and step


class RewardCall(Frozen):
    """One reward function: seconds per call, and whether TRL awaits it."""

    name: str
    is_async: bool
    calls: int
    mean_s: float
    max_s: float


class Utilisation(Frozen):
    """Means of the samples taken while a stage ran; None where a value cannot be read."""

    stage: str
    samples: int
    cpu_percent: float | None = None
    rss_bytes: int | None = None
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None
    other_gpu_percent: float | None = None
    power_w: float | None = None


class OtherLoad(Frozen):
    """Load by other processes while steps were measured."""

    cores: float  # cores that they took, on average, of those open to this process; a hypervisor counts with them
    of: int  # cores open to this process
    gpu_percent: float | None = None  # part of the GPU's time that they took; None without a GPU, or where nobody tells
    matters: bool = False  # True where the measured seconds are likely to be longer for it

    @property
    def words(self) -> str:
        """The load as part of a sentence."""
        gpu = "" if self.gpu_percent is None else f" and {self.gpu_percent:.0f}% of the GPU's time"
        return f"other processes took {self.cores:.2f} of {plural(self.of, 'core')}{gpu}"

    @property
    def warning(self) -> str:
        return f"{self.words}: measured beside other work, figures are worth little"


class DeviceMemory(Frozen):
    """Memory on the CUDA device over a run, without what a sleeping engine gave back."""

    allocated_bytes: int  # most that tensors had: what was needed
    reserved_bytes: int  # most that the allocator took for them, what lay between tensors included
    outside_bytes: int  # most that was added outside of the allocator: NCCL, libraries, captured graphs
    device_bytes: int  # most that was in use on the whole device, other processes included
    retries: int  # how often the allocator emptied its cache for want of room, which takes time
    failures: int  # how often it found none after that


class Phase(Frozen):
    """One phase of start-up, in the order of beginning: `import`, `data`, `model`, `engine`, `trainer`, a reward's name
    (its first calls over a network), `first_generation`, `first_reward`, `first_update` (the rest of the first step),
    and `script` and `before_attach`: a script until its trainer was built, or until `attach`."""

    name: str
    seconds: float


class KernelTime(Frozen):
    """One kernel by its name: how often it ran in a stage, and its seconds in all."""

    name: str
    count: int
    seconds: float


class StageKernels(Frozen):
    """The GPU's work of one stage in the profiled step."""

    stage: str  # its name
    seconds: float  # seconds of the stage that were profiled
    busy_s: float  # seconds of them in which a kernel or a copy ran
    kernels: int  # kernels and copies that ran
    launches: int  # calls that started them; a captured graph is one call
    top: list[KernelTime] = []  # the kernels that took longest


class ProfiledStep(Frozen):
    """Kernels of one optimizer step, from the GPU's own timeline."""

    step: int  # its number
    micro_batches: int  # micro batches that were trained on in it
    # tokens of each generation's longest completion that were generated while the profiler looked; None where none were
    tokens: int | None
    stages: list[StageKernels]  # by stage, those that ran

    def of(self, *stages: str) -> list[StageKernels]:
        """The rows of some stages."""
        return [row for row in self.stages if row.stage in stages]

    def busy_share(self, *stages: str) -> float | None:
        """Share of these stages' time in which a kernel ran, 0 to 1; None where none was profiled."""
        seconds = sum(row.seconds for row in self.of(*stages))
        return min(1.0, sum(row.busy_s for row in self.of(*stages)) / seconds) if seconds > 0.0 else None

    def per_micro_batch(self, stages: Iterable[str]) -> float:
        """Kernels of these stages per micro batch."""
        return sum(row.kernels for row in self.of(*stages)) / max(1, self.micro_batches)

    def per_token(self) -> float | None:
        """Kernels of generation per token of the longest completion; None where none was generated."""
        return sum(row.kernels for row in self.of("generation")) / self.tokens if self.tokens else None


class RankTimings(Frozen):
    """Mean seconds per step by stage on one rank."""

    rank: int
    step_s: float
    stages: dict[str, float]


class Sharding(Frozen):
    """One rank's part of a training that several share."""

    name: str  # ZeRO-1, ZeRO-2, ZeRO-3, FSDP2
    ranks: int
    parameters: float  # share of the model's numbers on this rank between two uses
    optimizer: float  # share of the trained numbers whose optimizer state is on this rank
    parameter_bytes: int | None = None  # of this rank's parameters between two uses, as counted
    # whether the optimizer's state, or parameters, are kept by the host beside a GPU; set where that is predicted
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def stage(self) -> int:
        """ZeRO's; FSDP2 shares as much as stage 3."""
        return int(self.name.removeprefix("ZeRO-")) if self.name.startswith("ZeRO-") else 3


class TrainerFacts(Frozen):
    """Facts of the trainer as it ran, which may differ from its YAML.

    `speedups_off` holds the reason of each speed-up that is off.
    On CUDA `device_bytes` is the memory of this rank's device, and `device_room_bytes` what of it the process held or
    could still take when the probe began: other processes' share left out. None elsewhere."""

    model_config_json: dict[str, Any]
    model_class: str
    parameters: int
    trainable_parameters: int
    peft: dict[str, Any] | None
    dtype: str
    device: str
    attn_implementation: str | None
    gradient_checkpointing: bool
    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    generation_batch_size: int
    max_completion_length: int
    beta: float
    loss_type: str
    has_ref_model: bool
    use_vllm: bool
    vllm_mode: str | None
    dataloader_num_workers: int
    world_size: int
    reward_weights: list[float]
    mask_truncated_completions: bool = False
    speedups: list[str] = []
    speedups_off: dict[str, str] = {}
    device_bytes: int | None = None
    device_room_bytes: int | None = None
    train_rows: int | None = None  # of the data set, and of the held-out ones together; None where they are streamed
    held_out_rows: int | None = None
    sharding: Sharding | None = None  # None where each rank holds everything

    @property
    def rows(self) -> int:
        """Completions of an optimizer step, over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


class ProbeRecord(Frozen):
    """Everything one probe measured on this rank, with the other ranks' stage means."""

    timings: StageTimings
    trainer: TrainerFacts
    tokens: TokenFacts | None = None
    images: ImageFacts | None = None
    resample: ResampleFacts | None = None  # None where it is off
    rewards: list[RewardCall] = []
    remote: list[RemoteCalls] = []  # of rewards over a network
    utilisation: list[Utilisation] = []
    others: OtherLoad | None = None  # None where nobody tells
    profiled: ProfiledStep | None = None
    zero_gradients: int = 0  # measured steps whose gradient was zero
    zero_unexplained: int = 0  # those of them with neither equal rewards in every group nor every completion masked
    occasions: dict[str, float] = {}  # seconds of one `evaluate` and one `save` where measured apart from the steps
    occasions_s: float = 0.0  # seconds that measuring them took: of an evaluation, a sample of its rows
    speedups: dict[str, dict[str, float]] = {}  # counts of the work of each speed-up that is on, by its name
    # share of each measured step's completions that were trained on while `skip_dead` left out the others; empty
    # without it
    living_shares: list[float] = []
    startup: list[Phase] = []
    fidelity: Fidelity | None = None
    engine: EngineFacts | None = None
    weight_sync_bytes: int | None = None
    rank: int = 0
    ranks: list[RankTimings] = []
    device_memory: DeviceMemory | None = None
    versions: dict[str, str] = {}  # those of packages
    runtime: dict[str, str] = {}  # what else makes a device fast or slow (`hardware.device.runtime_facts`)

    @property
    def living_share(self) -> float | None:
        """Mean of `living_shares`; None where there are none."""
        return math.fsum(self.living_shares) / len(self.living_shares) if self.living_shares else None


def seconds_once(record: ProbeRecord) -> dict[str, float]:
    """Seconds of one `evaluate` and one `save`: the mean of those that steps held, else of one timed apart."""
    held = {
        part: [s for s in spent if s > LEAST_OCCASION_S]
        for row in record.timings.stages
        for part, spent in row.parts.items()
        if part in ("evaluate", "save")
    }
    return record.occasions | {part: math.fsum(spent) / len(spent) for part, spent in held.items() if spent}
