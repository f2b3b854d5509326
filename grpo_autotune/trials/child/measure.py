"""What a trial does with a trainer, by its purpose: so many steps under the probe, or only sampling and judging."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.probe.probe import Probe
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.trial import PromptReward, TrialSpec
from grpo_autotune.train.runs.stop_after import Enough, StopAfter
from grpo_autotune.trials.child.fixed_lengths import FixedLengths, lengths_seen
from grpo_autotune.trials.child.reward_only import measure_rewards
from grpo_autotune.trials.child.turns import WITHOUT_END, Turns
from grpo_autotune.trials.child.worst_case import keep_worst_rows
from grpo_autotune.trials.heartbeat import Pulse
from grpo_autotune.trials.turn_file import in_turns


class Measured(NamedTuple):
    """What a trial that went well found; see `TrialOutcome`."""

    record: ProbeRecord | None = None
    step_s: tuple[float, ...] = ()
    rewards: tuple[PromptReward, ...] = ()
    lengths: tuple[list[int], ...] = ()
    notes: tuple[str, ...] = ()


def measure(
    trainer: Any, spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse, train: Callable[[], Any]
) -> Measured:
    """Do what `spec` asks with a trainer that was just built.

    Args:
        trainer: A `trl.GRPOTrainer`.
        spec: The trial.
        folder: Gets `spans.jsonl`.
        startup: What was measured of the start.
        pulse: Beats at every span edge and every forward pass of the model.
        train: Runs the trainer's training loop.
    """
    beating = beat_with_forwards(trainer, pulse)
    try:
        if spec.purpose == "rewards":
            seconds, rewards = measure_rewards(trainer, spec.steps, pulse)
            return Measured(step_s=tuple(seconds), rewards=tuple(rewards))
        return _measure_steps(trainer, spec, folder, startup, pulse, train)
    finally:
        beating.remove()


def _measure_steps(
    trainer: Any, spec: TrialSpec, folder: Path, startup: Startup, pulse: Pulse, train: Callable[[], Any]
) -> Measured:
    notes: list[str] = []
    lengths, warmup = spec.completion_lengths if spec.purpose != "probe" else None, spec.warmup
    if spec.purpose == "worst_case":
        notes += keep_worst_rows(trainer)
        lengths, warmup = [trainer.max_completion_length], max(1, spec.warmup)  # the first step makes the moments
    fixed = FixedLengths(trainer, lengths, trainer.args.seed, spec.seen_lengths) if lengths else None
    probe = Probe(trainer, startup=startup, out_dir=folder)
    probe.warmup = _whole_cycles(max(1, warmup) if in_turns(folder) else warmup, probe.cycle)
    block = _whole_cycles(spec.steps, probe.cycle)
    turns = Turns(trainer, folder, probe, pulse, block) if in_turns(folder) else None
    total = WITHOUT_END if turns else probe.warmup + block
    outlast(trainer, total)
    least = probe.warmup + _whole_cycles(spec.least_steps or spec.steps, probe.cycle)
    enough = None if spec.enough_s is None else Enough(least, probe.cycle, spec.enough_s)
    stop = StopAfter(total, lambda done: setattr(pulse, "step", done), enough)
    trainer.add_callback(stop)
    pulse.of = total
    probe.recorder.edge = lambda: pulse.beat(_stage(probe))
    try:
        pulse.begin()
        train()
    finally:
        probe.recorder.edge = None
        trainer.remove_callback(stop)
        probe.detach()
        if turns is not None:
            turns.remove()
        if fixed is not None:
            fixed.remove()
    record, generations = probe.record(), probe.tokens.from_the_first()
    return Measured(
        record,
        tuple(record.timings.step_s),
        lengths=tuple(lengths_seen(trainer, generations)) if spec.purpose == "probe" else (),
        notes=(*notes, *(fixed.notes if fixed else ())),
    )


def outlast(trainer: Any, steps: int) -> None:
    """Let a run that is configured for fewer than `steps` optimizer steps go on that long."""
    args = trainer.args
    if 0 < args.max_steps < steps:
        args.max_steps = steps
    elif args.max_steps <= 0:
        rows = getattr(trainer.train_dataset, "__len__", lambda: 0)()
        prompts = args.generation_batch_size / trainer.num_generations
        generations = math.floor(rows / prompts) * args.num_train_epochs
        a_generation = args.steps_per_generation * trainer.num_iterations / args.gradient_accumulation_steps
        if generations * a_generation < steps:
            args.max_steps = steps


def beat_with_forwards(trainer: Any, pulse: Pulse) -> Any:
    """Beat before each forward of the model, since one span may hold the sampling of thousands of tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.register_forward_pre_hook(lambda module, inputs: pulse.again())


def _whole_cycles(steps: int, cycle: int) -> int:
    return -(-steps // cycle) * cycle


def _stage(probe: Probe) -> str:
    span = probe.recorder.current()
    return "other" if span is None else span.stage or "other"
