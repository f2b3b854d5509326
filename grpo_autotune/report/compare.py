"""One run held against another: seconds stage by stage with intervals, and what else differs between the two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_autotune.records.comparison import (
    ComparedRun,
    Comparison,
    Difference,
    FactRow,
    Pair,
    RatioRow,
    RunKind,
    Word,
)
from grpo_autotune.records.probe import ProbeRecord, StageRow, StageTimings, cycle_means
from grpo_autotune.records.report import Report
from grpo_autotune.report.noise import DRIFT_CPU, DRIFT_GPU, Noise, change_interval
from grpo_autotune.units import amount

CONFIDENCE = 0.9
LEAST_SHARE = 0.01
"""Differences under this share of the baseline's step are within noise: stages that take no time differ by anything."""
ALIKE = 0.02
"""Mean lengths that differ by less count as one."""
ON_HOST = ("data", "prompt", "tools", "reward", "log_save_eval", "other")
"""Stages that cores do, with a GPU too."""
BY_TOKENS = ("policy_logprob", "reference_logprob", "backward")
"""Stages whose work follows the tokens of prompt and completion."""
ASIDE = ("output", "receipt", "search")
"""Sections of a configuration that no step depends on."""
SAME_DATA = ("path", "name", "revision", "split", "prompt_template", "prompt_format", "system_prompt", "max_samples")


class Scales(NamedTuple):
    """Factors on a run's seconds: for all of it, and further ones for some stages."""

    work: float = 1.0
    stages: Mapping[str, float] = {}

    def of(self, stage: str) -> float:
        """The factor on a stage."""
        return self.work * self.stages.get(stage, 1.0)


class Run(NamedTuple):
    """One run as a comparison reads it, from a report or from a search's winner."""

    name: str
    kind: RunKind
    facts: ProbeRecord | Report  # for the keys that the two have in common
    timings: StageTimings
    machine: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    peak_bytes: int | None

    @property
    def told(self) -> ComparedRun:
        """The run as a comparison names it."""
        step = self.series("step")
        return ComparedRun(name=self.name, kind=self.kind, step_s=float(np.median(step)), steps=len(step))

    def series(self, name: str) -> np.ndarray:
        """Seconds of a stage (or of `step`) by whole cycle; empty where the report holds none."""
        rows = {row.name: row.per_step_s for row in self.timings.stages} | {"step": self.timings.step_s}
        return np.asarray(cycle_means(rows[name], self.timings.cycle))


NO_SCALES = Scales()


def run_of_report(name: str, kind: RunKind, report: Report) -> Run:
    """A probe's or a training run's report."""
    stages = [StageRow(name=row.name, per_step_s=row.per_step_s, calls=row.calls) for row in report.stages]
    timings = StageTimings(steps=report.steps, step_s=report.step_seconds, stages=stages, cycle=report.cycle)
    peak = max((row.peak_bytes or 0 for row in report.stages), default=0) or None
    return Run(name, kind, report, timings, report.machine, report.config, peak)


def compare(runs: Sequence[Run], confidence: float = CONFIDENCE) -> Comparison:
    """Hold every run against the first."""
    pairs = [_pair(runs[0], run, confidence) for run in runs[1:]]
    return Comparison(confidence=confidence, baseline=runs[0].told, pairs=pairs)


def _pair(a: Run, b: Run, confidence: float) -> Pair:
    differences = list(_differences(a, b))
    scales = _scales(a, b)
    names = [row.name for row in a.timings.stages if _seconds(a, row.name) or _seconds(b, row.name)]
    together = confidence ** (1.0 / max(1, len(names)))
    return Pair(
        run=b.told,
        comparable=not {row.what for row in differences} & {"machine", "data"},
        differences=differences,
        changed=_changed(a.config, b.config),
        step=_row("step", a, b, scales, confidence),
        stages=[_row(name, a, b, scales, together) for name in names],
        facts=list(_facts(a, b)),
    )


def _row(name: str, a: Run, b: Run, scales: Scales, confidence: float) -> RatioRow:
    before, after = _seconds(a, name), _seconds(b, name)
    scaled = _seconds(b, name, scales)
    if before > 0.0 and scaled > 0.0 and len(a.series(name)) and len(b.series(name)):
        sides = _noise(a, name, NO_SCALES), _noise(b, name, scales)
        change = change_interval(math.log(scaled / before), *sides, confidence)
    else:
        change = None
    word: Word = "within noise"
    if abs(scaled - before) >= LEAST_SHARE * _seconds(a, "step"):
        if change is None:  # a stage that only one of them has
            word = "faster" if scaled == 0.0 else "slower" if before == 0.0 else word
        elif change[0] > 0.0 or change[2] < 0.0:
            word = "slower" if change[0] > 0.0 else "faster"
    scale = scaled / after if after else 1.0
    return RatioRow(name=name, before_s=before, after_s=after, scale=scale, change=change, word=word)


def _seconds(run: Run, name: str, scales: Scales = NO_SCALES) -> float:
    """Seconds as the report has them: the step's median, and a stage's part of all seconds times that."""
    if not len(run.series(name)):  # a report without seconds by step and stage
        stored = next((row.self_s for row in getattr(run.facts, "stages", ()) if row.name == name), 0.0)
        return stored * scales.of(name)
    return float(np.exp(_log_seconds(run, name, scales)(np.arange(len(run.series("step"))))))


def _log_seconds(run: Run, name: str, scales: Scales) -> Any:
    """The same of a selection of cycles, as a logarithm."""
    step = run.series("step") * scales.work
    for stage in scales.stages:
        if len(run.series(stage)):
            step = step + (scales.of(stage) - scales.work) * run.series(stage)
    spent = run.series(name) * scales.of(name)

    def of(chosen: np.ndarray) -> np.ndarray:
        median = np.median(step[chosen], axis=-1)
        share = 1.0 if name == "step" else spent[chosen].sum(-1) / step[chosen].sum(-1)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(median * share))

    return of


def _noise(run: Run, name: str, scales: Scales) -> Noise:
    on_gpu = run.facts.trainer.device != "cpu" and name not in ON_HOST
    drift, others = DRIFT_GPU if on_gpu else DRIFT_CPU, run.facts.others
    if others is not None:
        drift = math.hypot(drift, (others.gpu_percent or 0.0) / 100.0 if on_gpu else others.cores / max(1, others.of))
    return Noise(_log_seconds(run, name, scales), len(run.series(name)), drift)


def _scales(a: Run, b: Run) -> Scales:
    """Factors that give `b` the baseline's completions per step, and their mean length where nobody set another one:
    answers grow and shrink by chance and by training. Prompts keep their length, which data and image size set."""
    work = _completions(a) / _completions(b)
    old, new = a.facts.tokens, b.facts.tokens
    limits = {run.facts.trainer.max_completion_length for run in (a, b)}
    if old is None or new is None or not _lengths_differ(a, b) or len(limits) > 1:
        return Scales(work)
    before, after, prompt = old.completion.mean, new.completion.mean, new.prompt.mean
    whole = (prompt + before) / (prompt + after)
    return Scales(work, {"generation": before / max(after, 1.0), **dict.fromkeys(BY_TOKENS, whole)})


def _lengths_differ(a: Run, b: Run) -> bool:
    before, after = a.facts.tokens, b.facts.tokens
    if before is None or after is None:
        return False
    means = before.completion.mean, after.completion.mean
    return abs(means[1] - means[0]) > ALIKE * max(means)


def _completions(run: Run) -> int:
    t = run.facts.trainer
    return t.per_device_train_batch_size * t.gradient_accumulation_steps * t.world_size


def _differences(a: Run, b: Run) -> Iterator[Difference]:
    """Sentences to read before the seconds."""
    if _hardware(a) != _hardware(b):
        text = f"the machines differ ({_hardware(a)}; {_hardware(b)}): seconds cannot be compared"
        yield Difference(what="machine", text=text)
    old, new = a.facts.versions | a.facts.runtime, b.facts.versions | b.facts.runtime
    moved = [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    if moved:
        yield Difference(what="versions", text=f"versions differ: {', '.join(moved)}")
    data = [(run.config or {}).get("data") or {} for run in (a, b)]
    if all(data) and (keys := [key for key in SAME_DATA if data[0].get(key) != data[1].get(key)]):
        text = f"the data differ (data.{', data.'.join(keys)}): seconds cannot be compared"
        yield Difference(what="data", text=text)
    if _completions(a) != _completions(b):
        text = f"a step has {_completions(a)} completions and {_completions(b)}: compared per completion"
        yield Difference(what="work", text=text)
    if _lengths_differ(a, b) and a.facts.tokens is not None and b.facts.tokens is not None:
        means = f"{amount(a.facts.tokens.completion.mean)} and {amount(b.facts.tokens.completion.mean)} tokens"
        how = "generation, log-probs and backward are compared per token"
        how = how if _scales(a, b).stages else "another limit was set, so seconds are compared as they are"
        yield Difference(what="lengths", text=f"completions have {means} on average: {how}")
    if a.kind != b.kind:
        text = f"a {a.kind} run beside a {b.kind} run: only training evaluates and saves as the configuration says"
        yield Difference(what="kind", text=text)
    for run in (a, b):
        if run.facts.others is not None and run.facts.others.matters:
            yield Difference(what="load", text=f"during {run.name} {run.facts.others.words}")
        if not any(row.per_step_s for row in run.timings.stages):
            text = f"{run.name} holds no seconds by step and stage, so its stages have no interval: measure anew"
            yield Difference(what="record", text=text)


def _hardware(run: Run) -> str:
    machine, t = run.machine or {}, run.facts.trainer
    gpus = ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus") or [])
    cores, ranks = (
        f"{machine.get('cores')} cores of {machine.get('cpu')}",
        f"{t.world_size} on {t.device.split(':')[0]}",
    )
    return ", ".join(part for part in (gpus, cores, ranks) if part)


def _changed(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Keys of the configuration that differ, with both values; none where a run has no configuration."""
    if a is None or b is None:
        return {}
    old, new = dict(_flat(a)), dict(_flat(b))
    keys = [key for key in sorted(old | new) if key.split(".")[0] not in ASIDE and old.get(key) != new.get(key)]
    return {key: [str(old.get(key)), str(new.get(key))] for key in keys}


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _facts(a: Run, b: Run) -> Iterator[FactRow]:
    """Tokens, images, rewards and memory of both."""
    old, new = _fact_values(a), _fact_values(b)
    for (name, unit), before in old.items():
        if before is not None or new[name, unit] is not None:
            yield FactRow(name=name, unit=unit, before=before, after=new[name, unit])


def _fact_values(run: Run) -> dict[tuple[str, Any], float | None]:
    tokens, images, step_s = run.facts.tokens, run.facts.images, _seconds(run, "step")
    return {
        ("completions per step", "count"): _completions(run),
        ("completions per second", "rate"): _completions(run) / step_s,
        ("prompt tokens, mean", "count"): tokens and tokens.prompt.mean,
        ("completion tokens, mean", "count"): tokens and tokens.completion.mean,
        ("completions cut off", "share"): tokens and tokens.truncated_share,
        ("reward, mean", "reward"): tokens.reward_mean if tokens and tokens.groups else None,
        ("groups of equal rewards", "share"): tokens.dead_groups / tokens.groups if tokens and tokens.groups else None,
        ("pixels of an image, mean", "count"): images and images.pixels.mean,
        ("tokens of an image, mean", "count"): images.tokens.mean if images and images.tokens else None,
        ("most memory", "bytes"): run.peak_bytes,
    }
