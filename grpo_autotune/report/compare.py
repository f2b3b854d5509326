"""One run held against another: seconds stage by stage with intervals, and what else differs between the two.

The logarithm of a run's seconds is off by the scatter of its steps, which the run tells, and by the machine's pace in
that hour, which no number of its steps can show. So a drift of the pace is assumed of every run: `DRIFT_*`, or half of
the variance of its own steps, as a pace that wanders during a run wanders between runs. A run and its repetition are
then told apart in at most 1 - confidence of the cases, as long as the pace differs by no more; a machine twice as fast
for all of one run looks like a change, which only runs in turns tell apart.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from scipy.special import stdtrit

from grpo_autotune.advice.facts import PASSES
from grpo_autotune.records.comparison import Comparison, Pair, RatioRow, Word
from grpo_autotune.records.probe import STAGES, ProbeRecord, cycle_means
from grpo_autotune.records.report import Report
from grpo_autotune.report.configuration import changed_keys
from grpo_autotune.units import GIB, amount, plural

DRIFT_CPU, DRIFT_GPU = 0.14, 0.02
"""Least deviation of the logarithm of a run's pace. On cores that others may share, five runs of the demo had 0.10 to
0.13, and `benchmarks.aa_pairs` checks it on other runs; for a GPU of one's own it is an assumption."""
PER_SPREAD = 0.7 / 1.349
"""The same over the distance between the quartiles of a run's steps (1.349 standard deviations of a normal one)."""
LEAST_SHARE, ALIKE = 0.01, 0.02
"""Share of the baseline's step that is the least difference, and of mean lengths up to which they count as one."""
ON_HOST = ("data", "prompt", "tools", "reward", "log_save_eval", "other")  # stages that cores do, with a GPU too
SAME_DATA = (
    *("path", "name", "revision", "split", "split_ratio", "subsample", "max_samples", "mix", "seed"),
    *("max_pixels", "min_pixels", "max_prompt_tokens", "prompt_overflow"),
    *("prompt_template", "prompt_format", "system_prompt"),
)


class Run(NamedTuple):
    """One run as a comparison reads it; of a search, its winner."""

    name: str
    kind: Literal["probe", "search", "training"]
    report: Report

    def seconds(self) -> dict[str, tuple[float, list[float]]]:
        """Seconds of the step and of each stage that ran, and those of each whole cycle."""
        r = self.report
        stages = {row.name: (row.self_s, cycle_means(row.per_step_s, r.cycle)) for row in r.stages if row.per_step_s}
        return {"step": (r.step_s, cycle_means(r.step_seconds, r.cycle)), **stages}


def compare(runs: Sequence[Run], confidence: float = 0.9) -> Comparison:
    """Hold every run against the first."""
    pairs = [_pair(runs[0], run, confidence) for run in runs[1:]]
    return Comparison(confidence=confidence, baseline=runs[0].name, pairs=pairs)


def _pair(a: Run, b: Run, confidence: float) -> Pair:
    (factors, unequal), before, after = _equal_work(a, b), a.seconds(), b.seconds()
    spent = {name: seconds for name, (seconds, _) in after.items() if name != "step"}
    factors["step"] = sum(factors[name] * spent[name] for name in spent) / sum(spent.values())
    rows, names = [], {**before, **after}
    for name in names:
        (old_s, old), (new_s, new) = before.get(name, (0.0, [])), after.get(name, (0.0, []))
        half = math.inf  # where only one of them has the stage
        if old_s > 0.0 and new_s > 0.0:
            each = confidence if name == "step" else confidence ** (1.0 / (len(names) - 1))
            half = math.hypot(half_width(a.report, name, old, each), half_width(b.report, name, new, each))
        rows.append(ratio_row(name, (old_s, new_s), factors[name], half, a.report.step_s))
    old_facts, new_facts = facts_of(a), facts_of(b)
    return Pair(
        run=b.name,
        steps=[len(side["step"][1]) for side in (before, after)],
        apart=list(_apart(a, b)),
        differences=[*_differences(a, b), *unequal],
        changed=changed_keys(a.report.config, b.report.config) if a.report.config and b.report.config else {},
        rows=sorted(rows, key=lambda row: (row.name != "step", -max(row.before_s, row.after_s))),
        facts={name: [old_facts.get(name), new_facts.get(name)] for name in {**old_facts, **new_facts}},
    )


def ratio_row(name: str, spent: tuple[float, float], factor: float, half: float, step_s: float) -> RatioRow:
    """Two runs' seconds, the second times `factor` for equal work; the logarithm of their ratio is known to `half`."""
    old_s, new_s = spent
    equal_s, change, apart = factor * new_s, None, True
    if old_s > 0.0 and new_s > 0.0:
        ratio = equal_s / old_s
        change = [ratio * math.exp(end) - 1.0 for end in (-half, 0.0, half)] if half < math.log(1e6) else None
        apart = abs(math.log(ratio)) > half
    large = abs(equal_s - old_s) >= LEAST_SHARE * step_s
    word: Word = "within noise" if not (apart and large) else "slower" if equal_s > old_s else "faster"
    return RatioRow(name=name, before_s=old_s, after_s=new_s, scale=factor, change=change, word=word)


def half_width(run: Report | ProbeRecord, name: str, cycles: list[float], confidence: float) -> float:
    """Half of the interval of the logarithm of a run's seconds, of which these are the cycles': Student's for the error
    of their mean, normal for the drift, to which comes what is lost with the share that other processes took."""
    on_gpu, others = run.trainer.device != "cpu" and name not in ON_HOST, run.others
    taken = 0.0 if others is None else (others.gpu_percent or 0.0) / 100.0 if on_gpu else others.cores / others.of
    least = math.hypot(DRIFT_GPU if on_gpu else DRIFT_CPU, math.log(1.0 - min(taken, 0.9)))
    return half_interval(cycles, least, confidence)


def half_interval(cycles: list[float], least: float, confidence: float) -> float:
    """The same with `least` for the drift of the pace, where the cycles do not show more."""
    if len(cycles) < 2:
        return math.inf
    tail, error = (1.0 + confidence) / 2.0, statistics.stdev(cycles) / statistics.fmean(cycles) / len(cycles) ** 0.5
    low, _, high = statistics.quantiles([math.log(max(spent, 1e-9)) for spent in cycles], method="inclusive")
    drift = max(least, PER_SPREAD * (high - low))
    return math.hypot(float(stdtrit(len(cycles) - 1, tail)) * error, statistics.NormalDist().inv_cdf(tail) * drift)


def _equal_work(a: Run, b: Run) -> tuple[dict[str, float], list[str]]:
    """Factors of the seconds of `b` for the completions per step of `a`, and for their length where nobody set another
    one (answers grow by chance and by training; data and image size set prompts), and a sentence for each."""
    had, has = a.report.trainer.rows, b.report.trainer.rows
    factors, told = dict.fromkeys(STAGES, had / has), []
    if had != has:
        told.append(f"a step has {had} completions and {has}: compared per completion")
    old, new = a.report.tokens, b.report.tokens
    before, after = (max(tokens.completion.mean, 1.0) if tokens else 1.0 for tokens in (old, new))
    if not old or not new or abs(after - before) <= ALIKE * max(before, after):
        return factors, told
    how = "another limit was set, so seconds are compared as they are"
    if a.report.trainer.max_completion_length == b.report.trainer.max_completion_length:
        how = "generation, log-probs and backward are compared per token"
        factors["generation"] *= before / after
        for name in PASSES:
            factors[name] *= (new.prompt.mean + before) / (new.prompt.mean + after)
    return factors, [*told, f"completions have {amount(before)} and {amount(after)} tokens on average: {how}"]


def _apart(a: Run, b: Run) -> Iterator[str]:
    """Reasons for which seconds cannot be compared."""
    if _hardware(a) != _hardware(b):
        yield f"the machines differ ({_hardware(a)}; {_hardware(b)}): seconds cannot be compared"
    old, new = ((run.report.config or {}).get("data") or {} for run in (a, b))
    if old and new and (keys := [f"data.{key}" for key in SAME_DATA if old.get(key) != new.get(key)]):
        yield f"the data differ ({', '.join(keys)}): seconds cannot be compared"


def _hardware(run: Run) -> str:
    machine, t = run.report.machine or {}, run.report.trainer
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or []]
    cores = f"{plural(machine.get('cores') or 0, 'core')} of {machine.get('cpu')}"
    return ", ".join([*gpus, cores, f"{t.world_size} on {t.device.partition(':')[0]}"])


def _differences(a: Run, b: Run) -> Iterator[str]:
    """Sentences to read before the seconds."""
    if moved := changed_keys(*({**run.report.versions, **run.report.runtime} for run in (a, b))):
        yield f"versions differ: {', '.join(f'{key} {old} -> {new}' for key, (old, new) in moved.items())}"
    if a.kind != b.kind:
        yield f"a {a.kind} beside a {b.kind} run: only training evaluates and saves as the configuration says"
    for run in (a, b):
        if run.report.others is not None and run.report.others.matters:
            yield f"during {run.name} {run.report.others.words}"


def facts_of(run: Run) -> dict[str, float]:
    """Tokens, images, rewards and memory, as far as the run tells."""
    tokens, images = run.report.tokens, run.report.images
    facts = {"completions per second": run.report.trainer.rows / run.report.step_s}
    facts["most memory, GiB"] = max(row.peak_bytes or 0 for row in run.report.stages) / GIB
    if tokens:
        facts |= {"prompt tokens, mean": tokens.prompt.mean, "completion tokens, mean": tokens.completion.mean}
        facts |= {"completions cut off, %": 100.0 * tokens.truncated_share, "reward, mean": tokens.reward_mean}
        facts["groups of equal rewards, %"] = 100.0 * tokens.dead_groups / max(1, tokens.groups)
    return facts | ({"pixels of an image, mean": images.pixels.mean} if images else {})
