"""The order of a trial and its outcome: two files, all that parent and child tell each other beside the heartbeat.

Both are frozen, free of torch, and equal after a trip through JSON. Times are seconds, sizes bytes.
"""

from typing import Any, Literal, NamedTuple

from grpo_autotune.records.base import Frozen
from grpo_autotune.records.probe import DeviceMemory, ProbeRecord

Status = Literal["ok", "oom", "hang", "timeout", "killed", "crashed", "invalid", "reward_failed"]
"""How a trial ended.

`oom`: memory ran out, on the device or the host; `hang`: no sign of life for too long; `timeout`: over its own limit;
`killed`: by a signal that nobody here sent; `invalid`: the configuration or the machine refuses it; `reward_failed`: a
reward raised or returned what cannot be used; `crashed`: any other error.
"""

Purpose = Literal["probe", "timed", "worst_case", "rewards"]
"""What a trial measures.

`probe`: the configuration as it is, free completion lengths; `timed`: the same prompts for every trial and completion
lengths fixed at `seen_lengths`, then `completion_lengths`; `worst_case`: one step with the longest prompts, the largest
images and full-length completions, optimizer state in place; `rewards`: generation and rewards alone, free lengths, no
training.
"""


SPEC_FILE = "spec.json"
OUTCOME_FILE = "outcome.json"
HEARTBEAT_FILE = "heartbeat"
LOG_FILE = "log.txt"
SERVER_LOG = "server.txt"

TRIAL_ARGUMENTS = {
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "auto_find_batch_size": False,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
}
"""`GRPOConfig` keys of a run whose figures are wanted and whose model is not: it saves, uploads and reports nothing,
and does not go on with smaller batches where memory ran out."""


class Progress(NamedTuple):
    """Progress of a trial: a phase of start-up or a stage, and the step it belongs to (0 before the first)."""

    stage: str
    step: int
    of: int


class TrialSpec(Frozen):
    """One trial."""

    number: int  # number in the study; its folder is `trials/0007`
    purpose: Purpose = "timed"  # see `Purpose`
    config: dict[str, Any]  # the whole configuration, as `RunConfig.to_dict` gives it
    # key path -> value, where it differs from the user's configuration or belongs to the space
    knobs: dict[str, Any] = {}
    steps: int = 3  # optimizer steps to measure (for `rewards`: generation batches)
    least_steps: int | None = None  # of them, those that are measured however long they take; None is all
    enough_s: float | None = None  # seconds of training after which no more than `least_steps` are measured
    warmup: int = 1  # optimizer steps before them that are put aside
    # lengths in tokens to draw each completion's length from (repeatable, by row and seed); None leaves lengths free
    completion_lengths: list[int] | None = None
    # lengths in tokens of the first prompts' completions, one list per prompt, which come before those
    seen_lengths: list[list[int]] = []
    limit_s: float = 600.0  # wall-clock limit of the whole trial, start-up included
    # longest age of the heartbeat after start-up, but in a stage that works elsewhere (a reward, a compiler)
    hang_s: float = 120.0
    # a TRL script and its arguments to run in place of `config`; `knobs` then are `GRPOConfig` overrides (`grpo.` in
    # front of a key may be there or not), vLLM's keys under `vllm.`, and `data.image_size`
    script: list[str] | None = None
    world_size: int = 1  # processes; more than one are started by `torchrun`
    # where the server listens that was started for it on this machine; None where there is none
    server_port: int | None = None
    # part of the machine that it is pinned to, beside others' trials; None for one that runs alone
    place: str | None = None
    cores: tuple[int, ...] = ()  # of that part, where a single process computes on them; none for all
    # who wanted it: `user`, `models`, `sampler`, `queue`, `race`, `revert`, `again`, `alone`; for the record alone
    source: str = "user"


class PromptReward(Frozen):
    """Rewards of one prompt's completions in a `rewards` trial; prompts are numbered as the data set numbers them."""

    prompt: int
    rewards: list[float]
    truncated: int


class TrialOutcome(Frozen):
    """The outcome of a trial."""

    number: int  # the trial's
    status: Status  # see `Status`
    # one line for a trial that did not end well: error type and message, or what was seen from outside
    why: str | None = None
    error_type: str | None = None  # name of the exception's class, where there was one
    record: ProbeRecord | None = None  # the probe's record; None where no step was measured
    step_s: list[float] = []  # seconds of each measured step, or of one in the mean of each round of a race
    # share of the completions of each of them that were trained on (`ProbeRecord.living_shares`)
    living_shares: list[float] = []
    # most memory over the trial: the resident set of the process, or on CUDA what tensors had and what was added
    # outside of the allocator (where memory ran out, all that the allocator held)
    peak_bytes: int | None = None
    # what of it no model is the reason for: `peak_bytes - idle_bytes` is what the trial needed
    idle_bytes: int | None = None
    device_memory: DeviceMemory | None = None  # on CUDA the figures behind it, and those of the whole device
    # most that the process could have held under a limit on its addresses; None without one
    most_bytes: int | None = None
    rung: str | None = None  # for `oom`: the first change that needs less memory and learns the same, in words
    overshoot_bytes: int | None = None  # for `oom`: memory asked for beyond what there was, where the error said so
    startup_s: float | None = None  # seconds from the request to the first step's begin
    elapsed_s: float = 0.0  # seconds of the whole trial, as the parent saw them
    warm: bool = False  # True if the process had run another trial before this one
    rewards: list[PromptReward] = []  # of a `rewards` trial
    # of a `probe`: its completions' lengths in tokens, one list per prompt, in the order in which they were generated;
    # empty where other trials cannot be given the same
    lengths: list[list[int]] = []
    # what could not be done as asked, a sentence each (lengths that an engine leaves free, for instance)
    notes: list[str] = []
