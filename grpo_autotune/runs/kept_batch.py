"""The batch of a run that goes on with another number of processes: accumulation changes, completions per step do not.

The marker of each checkpoint holds the completions per step and every number of processes that the run has had.
"""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_autotune.config.batch import BatchPlan
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.runs.checkpoints import batch_of
from grpo_autotune.runs.folder import RunFolder, find_start
from grpo_autotune.units import plural


def with_kept_batch(config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> RunConfig:
    """The configuration with which the run in a folder keeps its completions per step on the processes that are there;
    as it is where their number is the same, or the batch was changed beside it.

    Raises:
        ConfigError: Accumulation cannot take the change; or the folder, as `find_start`.
    """
    start = find_start(folder, resume=True).checkpoint
    completions, earlier = batch_of(start.path) if start else (0, [])
    plan = config.batch
    per_process = plan.completions_per_step // plan.processes
    before = next((number for number in earlier if per_process * number == completions), None)
    if before is None or before == plan.processes:
        return config
    keys = accumulated(config, before)
    had = f"the run had {plural(before, 'rank')} and {completions} completions per step"
    if keys is None:
        what = f"{had}, which accumulation cannot keep on {plan.processes}"
        raise ConfigError(what, where="grpo.gradient_accumulation_steps", fix=_remedy(plan, completions))
    say(f"{had}; as many for the same prompts on {plan.processes}: {_told(keys)} (their answers are drawn anew)")
    return config.model_copy(update={"grpo": {**config.grpo, **keys}})


def with_this_batch(args: Any, completions: int, processes: list[int]) -> list[int]:
    """Numbers of `processes` that a checkpoint names, where they had the batch of these arguments of TRL; none where
    the user has changed it since."""
    here = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return processes if completions == here else []


def accumulated(config: RunConfig, before: int) -> dict[str, int] | None:
    """Keys of `grpo` by which the processes that are there do per step and generation as much as `before` did; None
    where that is no whole number."""
    plan = config.batch
    counts = {"gradient_accumulation_steps": plan.accumulation}
    if config.grpo.get("steps_per_generation") is not None:
        counts["steps_per_generation"] = plan.steps_per_generation
    if any(number * before % plan.processes for number in counts.values()):
        return None
    return {key: number * before // plan.processes for key, number in counts.items()}


def other_batch(config: RunConfig, before: int) -> str | None:
    """The sentence for a batch that was tuned with `before` processes and gets others; None where these are as many."""
    plan = config.batch
    if before == plan.processes:
        return None
    keys = accumulated(config, before)
    told = "accumulation cannot keep them" if keys is None else f"for as many as there set {_told(keys)}"
    completions = plan.completions_per_step
    return (
        f"this configuration was tuned with {plural(before, 'rank')} and {completions // plan.processes * before} "
        f"completions per step, and is trained on {plan.processes} with {completions}; {told}"
    )


def _told(keys: Mapping[str, int]) -> str:
    return ", ".join(f"grpo.{key} {value}" for key, value in keys.items())


def _remedy(plan: BatchPlan, completions: int) -> str:
    each, rest = divmod(completions, plan.processes)
    if rest:
        return f"Use a number of processes that divides {completions}."
    micro = next(number for number in range(min(plan.micro_batch, each), 0, -1) if each % number == 0)
    return f"Set grpo.per_device_train_batch_size {micro} and grpo.gradient_accumulation_steps {each // micro}."
