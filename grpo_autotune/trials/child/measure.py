"""The measurement of a trial, by its purpose: optimizer steps under the probe, or generation and rewards alone."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.probe.probe import Probe
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.trial import PromptReward, TrialSpec
from grpo_autotune.train.runs.callbacks import Enough, StopAfter, outlast
from grpo_autotune.trials.block_limit import is_interleaved
from grpo_autotune.trials.child.beating import beating
from grpo_autotune.trials.child.blocks import WITHOUT_END, BlockSchedule
from grpo_autotune.trials.child.fixed_lengths import FixedLengths, lengths_seen
from grpo_autotune.trials.child.occasions import checkpoint_s, evaluation_s
from grpo_autotune.trials.child.reward_only import measure_rewards
from grpo_autotune.trials.child.worst_case import keep_worst_rows
from grpo_autotune.trials.heartbeat import SAVING, HeartbeatWriter


class Measurement(NamedTuple):
    """The figures of a trial that went well; see `TrialOutcome`."""

    record: ProbeRecord | None = None
    step_s: tuple[float, ...] = ()
    living_shares: tuple[float, ...] = ()
    rewards: tuple[PromptReward, ...] = ()
    lengths: tuple[list[int], ...] = ()
    notes: tuple[str, ...] = ()


def measure(
    trainer: Any, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter, train: Callable[[], Any]
) -> Measurement:
    """Measure what `spec` asks for, with a trainer that was just built and that `train` trains. The folder gets
    `spans.jsonl`; the heartbeat beats at every span edge, and inside them as `beating` says."""
    with beating(trainer, heartbeat):
        if spec.purpose == "rewards":
            seconds, rewards = measure_rewards(trainer, spec.steps, heartbeat)
            return Measurement(step_s=tuple(seconds), rewards=tuple(rewards))
        return _measure_steps(trainer, spec, folder, startup, heartbeat, train)


def _measure_steps(
    trainer: Any, spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter, train: Callable[[], Any]
) -> Measurement:
    notes: list[str] = []
    lengths, warmup = spec.completion_lengths if spec.purpose != "probe" else None, spec.warmup
    if spec.purpose == "worst_case":
        notes += keep_worst_rows(trainer)
        lengths, warmup = [trainer.max_completion_length], max(1, spec.warmup)  # the first step makes the moments
    fixed = FixedLengths(trainer, lengths, trainer.args.seed, spec.seen_lengths) if lengths else None
    probe = Probe(trainer, startup=startup, out_dir=folder, profile=spec.purpose == "probe")
    probe.warmup = _whole_cycles(max(1, warmup) if is_interleaved(folder) else warmup, probe.cycle)
    if probe.profiles:
        probe.warmup = max(probe.warmup, probe.cycle) + probe.cycle
    block = _whole_cycles(spec.steps, probe.cycle)
    schedule = BlockSchedule(trainer, folder, probe, heartbeat, block) if is_interleaved(folder) else None
    total = WITHOUT_END if schedule else probe.warmup + block
    outlast(trainer, total)
    least = probe.warmup + _whole_cycles(spec.least_steps or spec.steps, probe.cycle)
    enough = None if spec.enough_s is None else Enough(least, probe.cycle, spec.enough_s)
    stop = StopAfter(total, lambda done: setattr(heartbeat, "step", done), enough)
    trainer.add_callback(stop)
    heartbeat.of = total
    probe.recorder.edge = lambda: heartbeat.beat(_stage(probe))
    try:
        heartbeat.begin()
        train()
    finally:
        probe.recorder.edge = None
        trainer.remove_callback(stop)
        probe.detach()
        if schedule is not None:
            schedule.remove()
        if fixed is not None:
            fixed.remove()
    record, generations = probe.record(), probe.tokens.from_the_first()
    if spec.purpose == "probe":
        record = record.model_copy(update=_occasions(trainer, spec, record, heartbeat))
    return Measurement(
        record,
        tuple(record.timings.step_s),
        tuple(record.living_shares),
        lengths=tuple(lengths_seen(trainer, generations)) if spec.purpose == "probe" else (),
        notes=(*notes, *(fixed.notes if fixed else ())),
    )


def _occasions(trainer: Any, spec: TrialSpec, record: ProbeRecord, heartbeat: HeartbeatWriter) -> dict[str, Any]:
    """Seconds of one evaluation, unless a step held one, and of one checkpoint, as the fields of the record; a script's
    trainer saves none here."""
    seen, seconds = {name for row in record.timings.stages for name in row.parts}, dict[str, float | None]()
    begin_s = time.perf_counter()
    if trainer.args.eval_strategy == "steps" and "evaluate" not in seen:
        heartbeat.beat("evaluation")
        seconds["evaluate"] = evaluation_s(trainer)
    if spec.script is None and spec.config.get("grpo", {}).get("save_strategy", "steps") == "steps":
        with heartbeat.within(SAVING):
            seconds["save"] = checkpoint_s(trainer)
    known = {name: s for name, s in seconds.items() if s is not None}
    return {"occasions": known, "occasions_s": time.perf_counter() - begin_s}


def _whole_cycles(steps: int, cycle: int) -> int:
    return -(-steps // cycle) * cycle


def _stage(probe: Probe) -> str:
    span = probe.recorder.current()
    return "other" if span is None else span.stage or "other"
