"""The records of a probe: frozen, free of torch, and equal after a trip through JSON.

Times are seconds, sizes bytes. A *measured step* is an optimizer step after the warm-up; lists with one entry per
step are in step order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_autotune.records.base import Frozen
from grpo_autotune.records.rollout import EngineFacts, Fidelity
from grpo_autotune.units import plural

STAGE_WORDS = {
    "generation": "generation",
    "policy_logprob": "the policy's log-probs",
    "reference_logprob": "the reference model's log-probs",
    "reward": "rewards",
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
    "equal": "each group's rewards were equal: check the rewards, or take prompts that the model solves now and then",
    "zero": "the gradient was zero: check which weights are trained, and which tokens masks and loss leave of them",
}
"""Cause of a step without a learning signal -> what was seen, and what to do."""

SAVES_NOTHING = "save_strategy best saves after an evaluation, and eval_strategy is no: set one of them to steps"


class StageRow(Frozen):
    """One stage of the step.

    Attributes:
        name: One of `STAGES`.
        per_step_s: Self time of each measured step: the device's timeline on CUDA, the host clock elsewhere.
        host_s: Host self time beside it; None where `per_step_s` already is the host's.
        hidden_s: Mean seconds per step of this stage's work on other threads while the main thread did something else.
        parts: Self time of each measured step by part (`policy_logprob`: `old_policy` and `training_forward`;
            `log_save_eval`: `log`, `save`, `evaluate`).
        calls: Mean number of spans per step.
        seams: The functions whose time this stage holds.
        peak_bytes: Most memory seen while the stage ran (CUDA allocator, or resident set on CPU); None if it never ran.
    """

    name: str
    per_step_s: list[float]
    host_s: list[float] | None = None
    hidden_s: float = 0.0
    parts: dict[str, list[float]] = {}
    calls: float = 0.0
    seams: list[str] = []
    peak_bytes: int | None = None


class StageTimings(Frozen):
    """Stages of the measured steps; for each step the stages' `per_step_s` sum to its `step_s`.

    Attributes:
        steps: Global step numbers of the measured steps.
        step_s: Seconds of each, from the end of the last step's logging to the end of its own.
        warmup_s: Seconds of the steps before them.
        stages: One row per stage, in the order of `STAGES`, those that never ran included.
        cycle: Number of optimizer steps after which the pattern of generating and reusing repeats (1 in most runs).
    """

    steps: list[int]
    step_s: list[float]
    warmup_s: list[float] = []
    stages: list[StageRow]
    cycle: int = 1


def cycle_means(values: Sequence[float], cycle: int) -> list[float]:
    """Mean of each whole cycle of `values`; the values themselves where there is no whole cycle. Any `cycle` steps in a
    row hold each kind of step once, so it does not matter where the first cycle begins."""
    whole = len(values) - len(values) % cycle
    return [math.fsum(values[at : at + cycle]) / cycle for at in range(0, whole, cycle)] or list(values)


class Spread(Frozen):
    """Summary of a set of numbers."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class TokenFacts(Frozen):
    """Token counts and rewards of the measured generations, over all ranks of this process's batches.

    Attributes:
        prompt: Prompt lengths in tokens, image tokens included.
        completion: Completion lengths in tokens.
        prompt_per_step: Prompt tokens per optimizer step (each completion's copy counted).
        completion_per_step: Completion tokens per optimizer step.
        padding_share: Share of the log-prob passes' token grid that is padding, 0 to 1.
        truncated_share: Share of completions that end without an end-of-sequence token.
        groups: Groups whose rewards were seen.
        dead_groups: Those whose rewards are all equal (max - min at most 1e-6).
        pass_rates: For each group, the share of completions whose first reward is at least 0.5.
        reward_mean: Mean weighted reward.
    """

    prompt: Spread
    completion: Spread
    prompt_per_step: float
    completion_per_step: float
    padding_share: float
    truncated_share: float
    groups: int
    dead_groups: int
    pass_rates: list[float]
    reward_mean: float


class ImageFacts(Frozen):
    """Images of the measured generations.

    Attributes:
        pixels: Width times height as the trainer receives them.
        per_prompt: Mean images per prompt.
        tokens: Language-model tokens per image now; None where the processor gives no patch grid.
        tokens_at: The same if the longest side were so many pixels (keys "384", "512", "768", "1024"), aspect kept;
            empty where the processor cannot tell.
        distinct_per_step: Distinct images per optimizer step.
        decodes_per_image: Decodings per distinct image and step in this process (without those of loader workers).
        processings_per_image: Runs of the image processor per distinct image and step.
    """

    pixels: Spread
    per_prompt: float
    tokens: Spread | None
    tokens_at: dict[str, float]
    distinct_per_step: float
    decodes_per_image: float
    processings_per_image: float


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
    """Load by other processes while steps were measured.

    Attributes:
        cores: Cores that they took, on average, of those open to this process; a hypervisor counts with them.
        of: Cores open to this process.
        gpu_percent: Part of the GPU's time that they took; None without a GPU, or where nobody tells.
        matters: True where the measured seconds are likely to be longer for it.
    """

    cores: float
    of: int
    gpu_percent: float | None = None
    matters: bool = False

    @property
    def words(self) -> str:
        """The load as part of a sentence."""
        gpu = "" if self.gpu_percent is None else f" and {self.gpu_percent:.0f}% of the GPU's time"
        return f"other processes took {self.cores:.2f} of {plural(self.of, 'core')}{gpu}"


class DeviceMemory(Frozen):
    """Memory on the CUDA device over a run, without what a sleeping engine gave back.

    Attributes:
        allocated_bytes: Most that tensors had: what was needed.
        reserved_bytes: Most that the allocator took for them, what lay between tensors included.
        outside_bytes: Most that was added outside of the allocator: NCCL, libraries, captured graphs.
        device_bytes: Most that was in use on the whole device, other processes included.
        retries: How often the allocator emptied its cache for want of room, which takes time.
        failures: How often it found none after that.
    """

    allocated_bytes: int
    reserved_bytes: int
    outside_bytes: int
    device_bytes: int
    retries: int
    failures: int


class Phase(Frozen):
    """One phase of start-up, in the order of beginning: `import`, `data`, `model`, `engine`, `trainer`, `first_step`
    (`script` and `before_attach`: a script until its trainer was built, or until `attach`)."""

    name: str
    seconds: float


class KernelTime(Frozen):
    """One kernel by its name: how often it ran in a stage, and its seconds in all."""

    name: str
    count: int
    seconds: float


class StageKernels(Frozen):
    """The GPU's work of one stage in the profiled step.

    Attributes:
        stage: Its name.
        seconds: Seconds of the stage that were profiled.
        busy_s: Seconds of them in which a kernel or a copy ran.
        kernels: Kernels and copies that ran.
        launches: Calls that started them; a captured graph is one call.
        top: The kernels that took longest.
    """

    stage: str
    seconds: float
    busy_s: float
    kernels: int
    launches: int
    top: list[KernelTime] = []


class ProfiledStep(Frozen):
    """Kernels of one optimizer step, from the GPU's own timeline.

    Attributes:
        step: Its number.
        micro_batches: Micro batches that were trained on in it.
        tokens: Tokens of each generation's longest completion that were generated while the profiler looked; None where
            none were.
        stages: By stage, those that ran.
    """

    step: int
    micro_batches: int
    tokens: int | None
    stages: list[StageKernels]

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


class TrainerFacts(Frozen):
    """Facts of the trainer as it ran, which may differ from its YAML.

    `speedups_off` holds the reason of each speed-up that is off.
    On CUDA `device_bytes` is the memory of this rank's device, and `device_room_bytes` what of it the process held or
    could still take when the probe began: other processes' share left out. None elsewhere.
    """

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


class ProbeRecord(Frozen):
    """Everything one probe measured on this rank, with the other ranks' stage means.

    Attributes:
        others: None where nobody tells.
        zero_gradients: Measured steps whose gradient was zero.
        occasions: Seconds of one `evaluate` and one `save`, where they were measured apart from the steps.
        speedups: Counts of the work of each speed-up that is on, by its name.
        versions: Those of packages.
        runtime: What else makes a GPU fast or slow (`hardware.device.runtime_facts`).
    """

    timings: StageTimings
    trainer: TrainerFacts
    tokens: TokenFacts | None = None
    images: ImageFacts | None = None
    rewards: list[RewardCall] = []
    utilisation: list[Utilisation] = []
    others: OtherLoad | None = None
    profiled: ProfiledStep | None = None
    zero_gradients: int = 0
    occasions: dict[str, float] = {}
    speedups: dict[str, dict[str, float]] = {}
    startup: list[Phase] = []
    fidelity: Fidelity | None = None
    engine: EngineFacts | None = None
    weight_sync_bytes: int | None = None
    rank: int = 0
    ranks: list[RankTimings] = []
    device_memory: DeviceMemory | None = None
    versions: dict[str, str] = {}
    runtime: dict[str, str] = {}
