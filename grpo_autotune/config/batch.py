"""The arithmetic of a GRPO batch: its checks, and the nearest legal values.

TRL generates for `steps_per_generation` micro steps at once (`GRPOConfig.__post_init__`, TRL 1.16):

    generation batch = per_device_train_batch_size x world size x steps_per_generation

and needs whole groups in it: the generation batch is a multiple of `num_generations`. The world size is the number of
processes (`WORLD_SIZE`, which torchrun sets).
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError


def world_size() -> int:
    """Number of training processes by `WORLD_SIZE` (1 without it); ConfigError if that is no positive whole number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        fix = "Unset it, or use torchrun."
        raise ConfigError(f"{text!r} is not a number of processes", where="WORLD_SIZE", fix=fix)
    return int(text)


_judged: ContextVar[bool] = ContextVar("judged", default=True)


@contextmanager
def of_other_processes() -> Iterator[None]:
    """Inside it a batch is that of a stored run, legal on the processes that it had: this command has one."""
    with ExitStack() as ended:
        ended.callback(_judged.reset, _judged.set(False))
        yield


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a `grpo` section, with TRL's defaults for keys that it leaves out."""

    micro_batch: int  # completions per forward pass, on one device
    processes: int  # world size
    accumulation: int  # micro steps per optimizer step
    steps_per_generation: int  # micro steps per generation
    num_generations: int  # completions per prompt (G)
    num_iterations: int  # times each generation is trained on
    generation_batch: int  # completions per generation, over all devices
    eval_batch: int | None  # completions per evaluation step, over all devices; None where evaluation is off
    eval_generations: int  # completions per prompt in evaluation

    @property
    def prompts_per_generation(self) -> int:
        return self.generation_batch // self.num_generations

    @property
    def completions_per_step(self) -> int:
        return self.micro_batch * self.processes * self.accumulation


def batch_plan(grpo: Mapping[str, Any]) -> BatchPlan:
    """Compute and check the batch arithmetic of a `grpo` section whose types were checked. ConfigError, with the rule
    and the nearest legal values, where a count is not positive, both `generation_batch_size` and `steps_per_generation`
    are given, or a batch is not a whole number of groups."""

    def value(name: str) -> Any:
        return grpo[name] if name in grpo else grpo_keys()[name].default_value()

    _check_counts(grpo)
    micro, accumulation, group = (
        int(value(name)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    processes = world_size()
    steps = _steps_per_generation(
        value("generation_batch_size"), value("steps_per_generation"), micro, processes, accumulation
    )
    evaluates = value("eval_strategy") != "no"
    plan = BatchPlan(
        micro_batch=micro,
        processes=processes,
        accumulation=accumulation,
        steps_per_generation=steps,
        num_generations=group,
        num_iterations=int(value("num_iterations")),
        generation_batch=micro * processes * steps,
        eval_batch=int(value("per_device_eval_batch_size")) * processes if evaluates else None,
        eval_generations=int(value("num_generations_eval") or group),
    )
    if _judged.get():
        _check_groups(plan, "steps_per_generation" if value("steps_per_generation") else "gradient_accumulation_steps")
    return plan


COUNTS = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "steps_per_generation": 1, "generation_batch_size": 1, "num_iterations": 1, "num_generations": 2,
    "num_generations_eval": 1, "max_completion_length": 1,
}  # fmt: skip
"""Key -> smallest legal value. A group of one has its own reward as mean, so its advantage is always zero."""

MOST = 2**20
"""Largest legal value of each."""
SEARCHED = 4096
"""Group sizes above the one wanted among which the next legal one is looked for; else it is the whole batch."""

MAY_BE_NULL = frozenset(
    {"steps_per_generation", "generation_batch_size", "num_generations_eval", "max_completion_length"}
)


def _check_counts(grpo: Mapping[str, Any]) -> None:
    for name, least in COUNTS.items():
        count = grpo.get(name, least)
        if count is None and name in MAY_BE_NULL:
            continue
        if count is None or count < least:
            fix = f"Nearest legal: {least}."
            raise ConfigError(f"must be at least {least}, and is {count}", where=f"grpo.{name}", fix=fix)
        if count > MOST:
            raise ConfigError(f"must be at most {MOST}", where=f"grpo.{name}", fix=f"Nearest legal: {MOST}.")


def _steps_per_generation(batch: int | None, steps: int | None, micro: int, processes: int, accumulation: int) -> int:
    """Micro steps per generation, as `GRPOConfig.__post_init__` derives them."""
    if batch is None:
        return steps or accumulation
    if steps is not None:
        what = "generation_batch_size and steps_per_generation are both given, and each decides the other"
        raise ConfigError(what, where="grpo.generation_batch_size", fix="Remove one of them.")
    per_device, device_batch = f"per_device_train_batch_size {micro}", micro * processes
    if batch % device_batch and _judged.get():
        what = f"{batch} is not a multiple of {per_device} x world size {processes} = {device_batch}"
        fix = f"Nearest legal: {_words(_nearest_multiples(batch, device_batch))}."
        raise ConfigError(what, where="grpo.generation_batch_size", fix=fix)
    return max(1, batch // device_batch)


def _check_groups(plan: BatchPlan, steps_name: str) -> None:
    batch, group, processes = plan.generation_batch, plan.num_generations, plan.processes
    if batch % group:
        parts = processes * plan.steps_per_generation
        raise ConfigError(
            f"the generation batch must be a multiple of num_generations {group}, and is {batch} "
            f"(per_device_train_batch_size {plan.micro_batch} x world size {processes} x {steps_name} "
            f"{plan.steps_per_generation})",
            where="grpo.num_generations",
            fix=_remedy(batch, group, "num_generations", "per_device_train_batch_size", parts),
        )
    if plan.eval_batch is not None and plan.eval_batch % plan.eval_generations:
        batch, group = plan.eval_batch, plan.eval_generations
        raise ConfigError(
            f"the evaluation batch must be a multiple of the completions per prompt ({group}), and is "
            f"{batch} (per_device_eval_batch_size {batch // processes} x world size {processes})",
            where="grpo.per_device_eval_batch_size",
            fix=_remedy(batch, group, "num_generations_eval", "per_device_eval_batch_size", processes),
        )


def _remedy(batch: int, group: int, group_key: str, micro_key: str, parts: int) -> str:
    """The nearest divisors of the batch, or the nearest micro batches, of which it holds so many `parts`."""
    below = next((g for g in range(min(group - 1, batch), COUNTS[group_key] - 1, -1) if batch % g == 0), None)
    above = next((g for g in range(group + 1, min(batch, group + SEARCHED) + 1) if batch % g == 0), batch)
    groups = ([] if below is None else [below]) + ([above] if group < above <= MOST else [])
    choices = [f"{group_key} {_words(groups)}"] if groups else []
    unit = group // math.gcd(group, parts)
    choices.append(f"{micro_key} {_words(_nearest_multiples(batch // parts, unit))}")
    return f"Nearest legal: {', or '.join(choices)}."


def _nearest_multiples(wanted: int, of: int) -> list[int]:
    low = wanted // of * of
    return [x for x in (low, low + of) if x]


def _words(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
