"""One run held against another: seconds stage by stage with intervals, and what else differs between the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_autotune.records.comparison import ComparedRun, Comparison, Pair, RatioRow, RunKind, Word
from grpo_autotune.records.probe import ProbeRecord, cycle_means
from grpo_autotune.records.report import Report
from grpo_autotune.report.noise import DRIFT_CPU, DRIFT_GPU, Noise, change_interval
from grpo_autotune.units import GIB, amount

LEAST_SHARE = 0.01
"""Differences under this share of the baseline's step are within noise: stages that take no time differ by anything."""
ALIKE = 0.02
"""Mean lengths that differ by less count as one."""
ON_HOST = ("data", "prompt", "tools", "reward", "log_save_eval", "other")
"""Stages that cores do, with a GPU too."""
BY_TOKENS = ("policy_logprob", "reference_logprob", "backward")
"""Stages whose work follows the tokens of prompt and completion."""
SAME_DATA = ("path", "name", "revision", "split", "prompt_template", "prompt_format", "system_prompt", "max_samples")
ASIDE = ("output", "receipt", "search")
"""Sections of a configuration that no step depends on."""

Series = Mapping[str, np.ndarray]


class Run(NamedTuple):
    """One run as a comparison reads it, from a report or from a search's winner."""

    name: str
    kind: RunKind
    facts: ProbeRecord | Report  # for the keys that the two have in common
    seconds: Series  # of the step and of each stage that ran, by whole cycle
    machine: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    peak_bytes: int | None

    @property
    def told(self) -> ComparedRun:
        """The run as a comparison names it."""
        step = self.seconds["step"]
        return ComparedRun(name=self.name, kind=self.kind, step_s=float(np.median(step)), steps=len(step))

    @property
    def completions(self) -> int:
        """Completions of an optimizer step."""
        t = self.facts.trainer
        return t.per_device_train_batch_size * t.gradient_accumulation_steps * t.world_size


def seconds_by_cycle(step_s: Sequence[float], stages: Sequence[Any], cycle: int) -> Series:
    """Seconds of the step and of the stages that ran, by whole cycle."""
    rows = {"step": step_s} | {row.name: row.per_step_s for row in stages if any(row.per_step_s)}
    return {name: np.asarray(cycle_means(values, cycle)) for name, values in rows.items()}


def compare(runs: Sequence[Run], confidence: float = 0.9) -> Comparison:
    """Hold every run against the first."""
    pairs = [_pair(runs[0], run, confidence) for run in runs[1:]]
    return Comparison(confidence=confidence, baseline=runs[0].told, pairs=pairs)


def _pair(a: Run, b: Run, confidence: float) -> Pair:
    names = [name for name in {**a.seconds, **b.seconds} if name != "step"]
    elsewhere, equal = list(_elsewhere(a, b)), b._replace(seconds=_equal_work(a, b))
    facts = {name: [value, _facts(b)[name]] for name, value in _facts(a).items()}
    return Pair(
        run=b.told,
        comparable=not elsewhere,
        differences=[*elsewhere, *_differences(a, b)],
        changed=_changed(a.config, b.config) if a.config and b.config else {},
        step=_row("step", a, b, equal, confidence),
        stages=[_row(name, a, b, equal, confidence ** (1.0 / len(names))) for name in names],
        facts={name: values for name, values in facts.items() if values != [None, None]},
    )


def _row(name: str, a: Run, b: Run, equal: Run, confidence: float) -> RatioRow:
    """`equal` is `b` at the work of `a`."""
    before, after, scaled = (_seconds(run.seconds, name) for run in (a, b, equal))
    both = before > 0.0 and scaled > 0.0
    change = (
        change_interval(math.log(scaled / before), noise(a, name), noise(equal, name), confidence) if both else None
    )
    sure = not both or (change is not None and not change[0] <= 0.0 <= change[2])
    large = abs(scaled - before) >= LEAST_SHARE * _seconds(a.seconds, "step")
    word: Word = "within noise" if not (sure and large) else "slower" if scaled > before else "faster"
    scale = scaled / after if after else 1.0
    return RatioRow(name=name, before_s=before, after_s=after, scale=scale, change=change, word=word)


def _seconds(series: Series, name: str) -> float:
    """Seconds as a report has them: the step's median, and a stage's part of all seconds times that."""
    return float(np.exp(_log_seconds(series, name)(np.arange(len(series["step"]))))) if name in series else 0.0


def _log_seconds(series: Series, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The logarithm of the same, of some cycles; of none of a stage's seconds, that of next to nothing."""
    step, spent = series["step"], series[name]
    if name == "step":
        return lambda chosen: np.asarray(np.log(np.median(step[chosen], axis=-1)))
    return lambda chosen: np.asarray(
        np.log(np.median(step[chosen], axis=-1) * (spent[chosen].sum(-1) + 1e-9) / step[chosen].sum(-1))
    )


def noise(run: Run, name: str) -> Noise:
    """The error of the seconds of a stage, or of the step."""
    on_gpu = run.facts.trainer.device != "cpu" and name not in ON_HOST
    drift, others = DRIFT_GPU if on_gpu else DRIFT_CPU, run.facts.others
    if others is not None:
        drift = math.hypot(drift, (others.gpu_percent or 0.0) / 100.0 if on_gpu else others.cores / max(1, others.of))
    return Noise(_log_seconds(run.seconds, name), len(run.seconds[name]), drift)


def _equal_work(a: Run, b: Run) -> Series:
    """Seconds of `b` for as many completions per step as the baseline's, and for its mean length where nobody set
    another one: answers grow by chance and by training. Prompts keep their length, which data and image size set."""
    work = a.completions / b.completions
    series = {name: work * values for name, values in b.seconds.items()}
    for name, scale in _per_token(a, b).items():
        if name in series:
            series["step"] = series["step"] + (scale - 1.0) * series[name]
            series[name] = scale * series[name]
    return series


def _per_token(a: Run, b: Run) -> dict[str, float]:
    """Stage -> factor for the baseline's completion lengths; empty where they are alike or set otherwise."""
    (before, after), limits = _lengths(a, b), {run.facts.trainer.max_completion_length for run in (a, b)}
    if b.facts.tokens is None or abs(after - before) <= ALIKE * max(before, after) or len(limits) > 1:
        return {}
    prompt = b.facts.tokens.prompt.mean
    return {"generation": before / after} | dict.fromkeys(BY_TOKENS, (prompt + before) / (prompt + after))


def _lengths(a: Run, b: Run) -> tuple[float, float]:
    """Mean lengths of completions; alike where one is not known."""
    before, after = a.facts.tokens, b.facts.tokens
    if before is None or after is None:
        return 1.0, 1.0
    return max(before.completion.mean, 1.0), max(after.completion.mean, 1.0)


def _elsewhere(a: Run, b: Run) -> Iterator[str]:
    """Reasons for which seconds cannot be compared."""
    if _hardware(a) != _hardware(b):
        yield f"the machines differ ({_hardware(a)}; {_hardware(b)}): seconds cannot be compared"
    old, new = ((run.config or {}).get("data") or {} for run in (a, b))
    if old and new and (keys := [f"data.{key}" for key in SAME_DATA if old.get(key) != new.get(key)]):
        yield f"the data differ ({', '.join(keys)}): seconds cannot be compared"


def _differences(a: Run, b: Run) -> Iterator[str]:
    """Sentences to read before the seconds."""
    moved = _changed({**a.facts.versions, **a.facts.runtime}, {**b.facts.versions, **b.facts.runtime}, aside=())
    if moved:
        yield f"versions differ: {', '.join(f'{key} {old} -> {new}' for key, (old, new) in moved.items())}"
    if a.completions != b.completions:
        yield f"a step has {a.completions} completions and {b.completions}: compared per completion"
    before, after = _lengths(a, b)
    if abs(after - before) > ALIKE * max(before, after):
        how = "generation, log-probs and backward are compared per token"
        how = how if _per_token(a, b) else "another limit was set, so seconds are compared as they are"
        yield f"completions have {amount(before)} and {amount(after)} tokens on average: {how}"
    if a.kind != b.kind:
        yield f"a {a.kind} beside a {b.kind} run: only training evaluates and saves as the configuration says"
    for run in (a, b):
        if run.facts.others is not None and run.facts.others.matters:
            yield f"during {run.name} {run.facts.others.words}"


def _hardware(run: Run) -> str:
    machine, t = run.machine or {}, run.facts.trainer
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or []]
    cores = f"{machine.get('cores')} cores of {machine.get('cpu')}"
    return ", ".join([*gpus, cores, f"{t.world_size} on {t.device.partition(':')[0]}"])


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], aside: Sequence[str] = ASIDE) -> dict[str, list[str]]:
    """Keys that differ, with both values."""
    old, new = dict(_flat(a)), dict(_flat(b))
    keys = [key for key in sorted(old | new) if key.partition(".")[0] not in aside and old.get(key) != new.get(key)]
    return {key: [str(old.get(key)), str(new.get(key))] for key in keys}


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield from _flat(value, f"{path}{key}.") if isinstance(value, Mapping) and value else ((f"{path}{key}", value),)


def _facts(run: Run) -> dict[str, float | None]:
    """Tokens, images, rewards and memory."""
    tokens, images = run.facts.tokens, run.facts.images
    groups = tokens.groups if tokens else 0
    return {
        "completions per second": run.completions / run.told.step_s,
        "prompt tokens, mean": tokens.prompt.mean if tokens else None,
        "completion tokens, mean": tokens.completion.mean if tokens else None,
        "completions cut off, %": 100.0 * tokens.truncated_share if tokens else None,
        "reward, mean": tokens.reward_mean if tokens and groups else None,
        "groups of equal rewards, %": 100.0 * tokens.dead_groups / groups if tokens and groups else None,
        "pixels of an image, mean": images.pixels.mean if images else None,
        "tokens of an image, mean": images.tokens.mean if images and images.tokens else None,
        "most memory, GiB": run.peak_bytes / GIB if run.peak_bytes else None,
    }
