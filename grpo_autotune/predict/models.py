"""Cost of a configuration before it runs: seconds by stage and the peak of memory, each with an interval.

The first guess comes from the probe alone; every trial that ended well is learnt, and the prediction made before it was
is kept, so that the models' error is known. A search that is resumed builds them again by learning the same outcomes in
the same order.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import NothingSucceeded
from grpo_autotune.hardware import Machine, find_gpu
from grpo_autotune.knobs import engine, knobs_of
from grpo_autotune.knobs.sharding import ZERO_KNOBS
from grpo_autotune.predict.calls import longest_s
from grpo_autotune.predict.features import PARTS, Rates, features
from grpo_autotune.predict.memory import PeakFit, PeakObservation, increment
from grpo_autotune.predict.objective import Interval
from grpo_autotune.predict.regression import STRANGE_SPREAD, Fit, Observation, Place, wide
from grpo_autotune.predict.room import busy_share
from grpo_autotune.predict.workload import Workload, workload
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.probe import ProbeRecord, StageTimings, cycle_means
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.speedups.base import kernel_name

CPU_FLOPS_PER_BYTE = 8.0
"""Operations a core does in the time it moves a byte from memory: about 60 a nanosecond against 8 bytes, as
`hardware.ceilings` measures it on server cores. Only weighs bytes against operations until trials tell."""

GPU_FLOPS_PER_BYTE = 250.0
"""The same for a card that the table of GPUs does not know; those of the last five years lie between 150 and 350."""

LINK_BYTES_S = {"cuda": 2.5e10, "cpu": 1e9}
"""Bytes that a rank is assumed to send where no probe measured it: over PCIe 4.0 with 16 lanes (31.5 GB/s by its
specification), and by gloo between processes of one host. Links of GPUs are up to 20 times as fast, networks slower."""
FEW_TIMES = 4.0
"""Times the bytes that were sent, up to which these tell the rate: few bytes take the time of their calls."""
UNKNOWN_SPREAD = 1.0
"""Relative standard deviation of what follows from such a rate: its interval is a factor of several to either side."""

LEAST_S = 1e-9
"""A part of fewer seconds per step teaches nothing: no clock tells them apart."""
CONFIDENCE = 0.9
FIRST_SPREAD = 0.25
"""Relative error expected of a step's seconds before any prediction was checked, and the number of checks it counts
for: the interval narrows as predictions prove good, and widens as they do not."""
FIRST_CHECKS = 3


class Check(NamedTuple):
    """A prediction that a trial then measured."""

    name: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Models:
    """Cost and memory models of one search. Frozen: `learn` answers a new one."""

    base: RunConfig  # the configuration that was probed
    record: ProbeRecord  # its probe
    machine: Machine  # what it ran on
    outcomes: tuple[tuple[RunConfig, TrialOutcome], ...] = ()  # trials learnt, in order, each with its configuration
    checks: tuple[Check, ...] = ()  # intervals made before each of them was learnt

    @classmethod
    def from_probe(
        cls, config: RunConfig, record: ProbeRecord, machine: Machine, outcome: TrialOutcome | None = None
    ) -> "Models":
        """Models that know nothing but one probe (NothingSucceeded where that measured no step or no generation);
        `outcome` is that as a trial, for its peak and idle memory."""
        if record.tokens is None or not record.timings.step_s:
            raise NothingSucceeded("the probe measured no whole step", fix="Probe more steps.")
        first = TrialOutcome(number=-1, status="ok", record=record, step_s=record.timings.step_s)
        if outcome is not None:
            first = outcome.model_copy(update={"record": record})
        return cls(config, record, machine, ((config, first),))

    def learn(self, config: RunConfig, outcome: TrialOutcome) -> "Models":
        """The models after one more trial. One that ran out of memory teaches its peak at least; other failures and
        trials without a step teach nothing."""
        checks = list(self.checks)
        measured = stage_seconds(outcome.record.timings) if outcome.record is not None else {}
        if outcome.status == "ok" and measured:
            before = self.stages_s(config)
            checks += [Check(name, before[name].value, s) for name, s in measured.items() if name in before]
            checks.append(Check("step", self.step_s(config).value, statistics.median(_steps(outcome))))
        if measured and outcome.status == "ok" and outcome.peak_bytes is not None and outcome.idle_bytes is not None:
            increment = self.peak_bytes(config).value - outcome.idle_bytes
            checks.append(Check("memory", increment, float(outcome.peak_bytes - outcome.idle_bytes)))
        if outcome.status not in ("ok", "oom"):
            return self
        return replace(self, outcomes=(*self.outcomes, (config, outcome)), checks=tuple(checks))

    def step_s(self, config: RunConfig, load: Workload | None = None, without: Sequence[str] = ()) -> Interval:
        """Seconds of an optimizer step, or of other work under the configuration, `without` some parts."""
        parts = self._parts(config, load)
        parts = {part: guess for part, guess in parts.items() if part not in without}
        value = math.fsum(mean for mean, _ in parts.values())
        scatter = math.sqrt(math.fsum((mean * spread) ** 2 for mean, spread in parts.values())) / max(value, 1e-12)
        return self._interval("step", value, scatter)

    def evaluation_s(self, config: RunConfig, rows: int) -> Interval:
        """Seconds of one evaluation on so many held-out rows, where evaluation is on: steps that learn nothing."""
        plan, load = config.batch, self._load(config)
        all_ranks = plan.eval_batch or plan.processes
        calls, batch = -(-rows * plan.eval_generations // all_ranks), all_ranks // plan.processes
        facts = replace(load.facts, micro_batch=batch, generation_rows=batch, passes=calls, iterations=1)
        facts = replace(facts, group=plan.eval_generations)
        work = replace(load, facts=facts, generations=calls, rows_loaded=float(calls * batch), merged=1.0, waves=1.0)
        learns = ("backward", "optimizer", "weight_sync", "engine", "log_save_eval")
        return self.step_s(config, work, learns if load.sent else (*learns, "collectives"))  # DDP's are gradients

    def stages_s(self, config: RunConfig) -> dict[str, Interval]:
        held: dict[str, list[tuple[float, float]]] = {}
        for part, guess in self._parts(config).items():
            held.setdefault(PARTS[part], []).append(guess)
        return {
            stage: self._interval(stage, sum(m for m, _ in both), max((s for _, s in both), default=0.0))
            for stage, both in held.items()
        }

    def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Interval:
        """Most memory over a run: of the process on a CPU, of the device on a GPU; in the worst case with the longest
        prompts, the largest images and full-length completions."""
        guess = self._peaks.predict(self._load(config, worst_case=worst_case))
        increment, idle = self._interval("memory", guess.mean, guess.spread), self._peaks.idle
        return Interval(idle + increment.value, idle + increment.low, idle + increment.high)

    def errors(self) -> dict[str, dict[str, float]]:
        """Relative error of the predictions made before each trial was learnt, by stage, `step` and `memory`."""
        errors: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(check.name for check in self.checks):
            off = [abs(c.predicted / c.measured - 1.0) for c in self.checks if c.name == name and c.measured > 0.0]
            if off:
                p90 = float(np.percentile(off, 90))
                errors[name] = {"median": statistics.median(off), "p90": p90, "n": len(off)}
        return errors

    @property
    def _on_gpu(self) -> bool:
        return self.record.trainer.device.startswith("cuda")

    @cached_property
    def _rates(self) -> Rates:
        if not self._on_gpu:
            return Rates(CPU_FLOPS_PER_BYTE)
        first = self.machine.gpus[0].name if self.machine.gpus else ""
        row = find_gpu(self.record.runtime.get("gpu", first))
        return Rates(row.matrix_flops_s / row.bandwidth_bytes_s if row is not None else GPU_FLOPS_PER_BYTE)

    @cached_property
    def _image_tokens(self) -> dict[str, float]:
        """Tokens of an image at the sizes that trials had."""
        tokens = {}
        for config, outcome in self.outcomes:
            images = outcome.record.images if outcome.record is not None else None
            if images is not None and images.tokens is not None and config.data.image_size is not None:
                tokens[str(config.data.image_size)] = images.tokens.mean
        return tokens

    def _load(self, config: RunConfig, *, worst_case: bool = False) -> Workload:
        return workload(
            config, self.base, self.record, self.machine, seen_tokens=self._image_tokens, worst_case=worst_case
        )

    @cached_property
    def _fits(self) -> dict[tuple[str, str], Fit]:
        """A fit for every part of a stage and every choice of speed-ups that any trial had; those without the probe's
        own choice begin from it."""
        seen: dict[tuple[str, str], list[Observation]] = {}
        for config, outcome in self.outcomes:
            record = outcome.record
            if outcome.status != "ok" or record is None or record.tokens is None:
                continue
            load = workload(config, config, record, self.machine, measured=True)
            made, place = features(load, self._rates), place_of(config, load)
            for part, seconds in part_seconds(record.timings).items():
                if part in made and seconds > LEAST_S:
                    one = Observation(made[part], seconds, place.of(part), _idle(record, PARTS[part]))
                    seen.setdefault((part, family(config, part)), []).append(one)
        measured = part_seconds(self.record.timings)
        for part, seconds in reported_seconds(self.record.timings).items():
            several = seen.get((part, family(self.base, part)), [])
            if [one.seconds for one in several] == [measured.get(part)]:  # the probe's, and no trial's
                several[0] = several[0]._replace(seconds=seconds)
        first = {key: Fit(tuple(several)) for key, several in seen.items() if key[1] == family(self.base, key[0])}
        base = {part: fit for (part, _), fit in first.items()}
        return {key: first.get(key) or Fit(tuple(several), base.get(key[0])) for key, several in seen.items()}

    def _parts(self, config: RunConfig, load: Workload | None = None) -> dict[str, tuple[float, float]]:
        """Mean and relative standard deviation of every part that is predicted to run."""
        load = load or self._load(config)
        made, place = features(load, self._rates), place_of(config, load)
        parts = {}
        for part, wanted in made.items():
            fit, doubt = self._fit_for(part, family(config, part))
            if fit is not None:
                guess = fit.predict(wanted, place.of(part))
                parts[part] = (guess.mean, math.hypot(guess.spread, doubt))
        if "reward" in parts and ("reward", family(config, "reward")) not in self._fits:
            mean, spread = parts["reward"]  # not tried yet: the step waits as much longer as a batch of calls takes
            remote, plain = self.record.remote, [call.mean_s for call in self.record.rewards if not call.is_async]
            later_s = load.generations * (longest_s(remote, config) - longest_s(remote, self.base))
            parts["reward"] = max(min(mean, load.generations * math.fsum(plain)), mean + later_s), spread
        workers, seen = load.trainer.dataloader_num_workers, (outcome.record for _, outcome in self.outcomes)
        for part in SHARED:
            if part in parts and (part, family(config, part)) not in self._fits:
                parts[part] = self._shared(part, load, parts[part])
        if "data" in parts and workers and not any(one.trainer.dataloader_num_workers for one in seen if one):
            parts["data"] = self._beside(workers, parts)
        return parts

    def _beside(self, workers: int, parts: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
        """First guess of the loading that a step still waits for when workers load the next one beside it: what takes
        longer than the rest of the step, and on a CPU the share for which no core is idle."""
        loading = parts["data"][0]
        rest = math.fsum(mean for mean, _ in parts.values()) - loading
        hidden = loading - max(0.0, loading / workers - rest)
        busy = 0.0 if self._on_gpu else busy_share(self.record, self.machine, *BUSY_STAGES)
        return loading - hidden * (1.0 - (1.0 if busy is None else busy)), STRANGE_SPREAD

    @cached_property
    def _sent(self) -> Mapping[str, float]:
        return self._load(self.base).sent

    def _shared(self, part: str, load: Workload, guess: tuple[float, float]) -> tuple[float, float]:
        """First guess of a part where ranks share a training in a way that no trial had: the probe's seconds, and what
        other bytes take, by the rate of those that it sent or, where they are far more, by an assumed one."""
        before, after = self._sent.get(part, 0.0), load.sent.get(part, 0.0)
        measured = part_seconds(self.record.timings).get(part, 0.0)
        if not measured or not after or before == after:
            return guess
        if after < FEW_TIMES * before:
            return measured * after / before, STRANGE_SPREAD * max(1.0, before / after)
        return measured + (after - before) / LINK_BYTES_S["cuda" if self._on_gpu else "cpu"], UNKNOWN_SPREAD

    def _fit_for(self, part: str, choice: str) -> tuple[Fit | None, float]:
        """The fit that knows most about a part, and the doubt that comes with taking another's."""
        base_choice = family(self.base, part)
        also = ["training_forward"] if part in PASSES else []
        for name in (part, *also):
            for known in (choice, base_choice):
                if (name, known) in self._fits:
                    strange = STRANGE_SPREAD if known != choice or name != part else 0.0
                    return self._fits[name, known], strange
        return None, 0.0

    @cached_property
    def _peaks(self) -> PeakFit:
        seen = [one for config, outcome in self.outcomes if (one := self._peak_of(config, outcome)) is not None]
        return PeakFit(tuple(seen))

    def _peak_of(self, config: RunConfig, outcome: TrialOutcome) -> PeakObservation | None:
        """One trial's memory; None where it tells nothing. A bare record tells the peak of its stages; beyond what an
        idle process takes, that is all of it on a GPU, and by assumption what the formula says on a CPU."""
        record = outcome.record if outcome.record is not None and outcome.record.tokens is not None else None
        ran_out = outcome.status == "oom"
        if record is None and (not ran_out or (self._on_gpu and outcome.device_memory is None)):
            return None  # nothing was measured, or it was the host's memory that ran out
        if record is None:
            load = self._load(config, worst_case=True)
        else:
            load = workload(config, config, record, self.machine, measured=True)
        peak, idle = outcome.peak_bytes, outcome.idle_bytes
        if peak is None and record is not None and not ran_out:
            peak = max((row.peak_bytes or 0 for row in record.timings.stages), default=0)
            idle = 0 if record.trainer.device.startswith("cuda") else max(0, peak - round(increment(load)))
        if not peak or idle is None or peak <= idle:
            return None
        return PeakObservation(load, peak - idle + (outcome.overshoot_bytes or 0), idle, ran_out)

    def _interval(self, name: str, value: float, scatter: float) -> Interval:
        """`scatter` and the errors of earlier predictions, together."""
        off = [math.log(c.predicted / c.measured) for c in self.checks if c.name == name and min(c[1:]) > 0.0]
        known = math.sqrt((FIRST_CHECKS * FIRST_SPREAD**2 + math.fsum(e * e for e in off)) / (FIRST_CHECKS + len(off)))
        reach = wide(CONFIDENCE, FIRST_CHECKS + len(off)) * math.hypot(known, min(scatter, 1.0))
        return Interval(value, value * math.exp(-reach), value * math.exp(reach))


BUSY_STAGES = ("generation", "policy_logprob", "reference_logprob", "backward")
"""Stages that loader workers share the cores with."""
SHARED = ("collectives", "optimizer")
"""Parts of a step that depend on how ranks share it."""
COLLECTIVES = ("gather_parameters", "reduce_gradients")
"""Parts of `sync_wait` that are predicted by themselves, as `collectives`."""
PASSES = ("old_policy", "reference_logprob")
"""Passes without gradients: what the training forward taught prices them until one was timed."""


def place_of(config: RunConfig, load: Workload) -> Place:
    """Place of a setting among others: numbers that work grows with, words for what no formula describes."""
    facts = load.facts
    numbers = (facts.micro_batch, facts.row_tokens, facts.generation_rows)
    words = (
        kernel_name(load.trainer.attn_implementation),
        facts.training.checkpointing,
        engine.word(config),
        load.trainer.dataloader_num_workers,
    )
    return Place(tuple(math.log2(max(n, 1.0)) for n in numbers), tuple(str(word) for word in words))


def family(config: RunConfig, part: str = "") -> str:
    """Configurations whose stages follow the same features: those with the same speed-ups, compiled or not, and for
    rewards the same numbers of calls at once, for what ranks share the same stage and devices."""
    compiled = knobs_of(config, ["grpo.torch_compile"])["grpo.torch_compile"]
    lanes = [item.concurrency for item in config.rewards] if part == "reward" else ""
    shared = list(knobs_of(config, ZERO_KNOBS).values()) if part in SHARED and config.grpo.get("deepspeed") else ""
    return f"{config.speedups}, {'compiled' if compiled else 'eager'}{lanes}{shared}"


def stage_seconds(timings: StageTimings) -> dict[str, float]:
    """Seconds of each stage that ran: the median over cycles of generating and reusing."""
    medians = {row.name: _median(row.per_step_s, timings.cycle) for row in timings.stages}
    return {name: seconds for name, seconds in medians.items() if seconds > 0.0}


def part_seconds(timings: StageTimings) -> dict[str, float]:
    """The same by the names of `features.PARTS`: the policy's passes apart, and collectives."""
    medians = {row.name: _median(row.per_step_s, timings.cycle) for row in timings.stages}
    for row in timings.stages:
        if row.name == "policy_logprob":
            medians |= {part: _median(values, timings.cycle) for part, values in row.parts.items()}
        if row.name == "sync_wait":
            sent = math.fsum(_median(row.parts.get(part, []), timings.cycle) for part in COLLECTIVES)
            medians |= {"collectives": sent, "sync_wait": max(0.0, medians["sync_wait"] - sent)}
    return {part: seconds for part, seconds in medians.items() if part in PARTS}


def reported_seconds(timings: StageTimings) -> dict[str, float]:
    """The same as a report's table tells them: what the probe alone has measured is predicted from these numbers."""
    breakdown = break_down(timings)
    parts = {part: s for (stage, part), s in breakdown.parts_s.items() if stage == "policy_logprob"}
    parts["collectives"] = math.fsum(breakdown.parts_s.get(("sync_wait", part), 0.0) for part in COLLECTIVES)
    parts["sync_wait"] = breakdown.self_s.get("sync_wait", 0.0) - parts["collectives"]
    return {part: s for part, s in (breakdown.self_s | parts).items() if part in PARTS}


def _idle(record: ProbeRecord, stage: str) -> float | None:
    """Share of a stage's time in which a GPU ran no kernel; None where nobody looked."""
    busy = record.profiled.busy_share(stage) if record.profiled is not None else None
    return None if busy is None else 1.0 - busy


def _steps(outcome: TrialOutcome) -> list[float]:
    cycle = outcome.record.timings.cycle if outcome.record is not None else 1
    return cycle_means(outcome.step_s or (outcome.record.timings.step_s if outcome.record is not None else []), cycle)


def _median(values: Sequence[float], cycle: int) -> float:
    return statistics.median(cycle_means(values, cycle)) if values else 0.0
