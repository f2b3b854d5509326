"""The steps of a log: rows put together by step, with what of them is of use."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_autotune.interop.logs.lines import NEXT, Row, rows

RAY = "timing_s/"
TORN_TIMER = "(torn)"  # key of a step of which a timer is no number, or below zero
MOST_STEPS = 20_000  # steps that are kept, the last ones
COUNTERS = (  # keys that may number a step; of several in a row the first one here counts
    *("train/global_step", "training/global_step", "global_step/max_steps", "iteration", "step", "global_step"),
    *("Step", "_step"),
)
SPEEDS = ("train_speed(s/it)", "train_speed(iter/s)")
FACTS = {  # quantity -> keys of the frameworks that log it, any one of them
    "prompt tokens, mean": ("prompt_length/mean",),
    "completion tokens, mean": ("response_length/mean", "completions/mean_length", "completion_length"),
    "completion tokens, longest": ("response_length/max", "completions/max_length"),
    "completions cut off": ("response_length/clip_ratio", "completions/clipped_ratio"),
    "groups of equal rewards": ("frac_reward_zero_std",),
    "reward, mean": ("reward", "reward/overall", "critic/score/mean", "critic/rewards/mean"),
    "KL": ("kl", "actor/kl_loss"),
    "tokens": ("perf/total_num_tokens",),
    "tokens per second and GPU": ("perf/throughput",),
    "most memory, GiB": ("memory(GiB)", "perf/max_memory_allocated_gb", "actor/perf/max_memory_allocated_gb"),
}
READ = {key for keys in FACTS.values() for key in keys} | {
    *(*SPEEDS, "step_time", "perf/time_per_step", "train_runtime", "train_steps_per_second")
}
NOT_A_NUMBER = "values that are no finite number"


class LoggedSteps:
    """The steps of one file in their order: values, and the line that each begins on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[int, dict[str, float]] = {}
        self.lines: dict[int, int] = {}
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._last = 0
        try:
            for row in rows(path, self.skipped):
                self._take(row)
        except (EOFError, zlib.error):
            self.warnings.append("the packed file is cut off: what comes before is read")

    def _take(self, row: Row) -> None:
        values, step = self._of_use(row.values), self._number_of(row)
        if step is None or not values:
            self.skipped["rows without a step, or with nothing of use"] += 1
            return
        if step < self._last:  # a resumed run, or another one behind the first: what it does again is dropped
            dropped = [known for known in self.values if known >= step]
            for known in dropped:
                self._forget(known)
            self.skipped["steps of an earlier run"] += len(dropped)
            what = f"step numbers go back from {self._last} to {step}: the later run counts"
            self.warnings.append(f"line {row.line}: {what}")
        self._last = step
        self.values.setdefault(step, {}).update(values)
        self.lines.setdefault(step, row.line)
        if len(self.values) > MOST_STEPS:
            self._forget(next(iter(self.values)))
            self.skipped[f"steps before the last {MOST_STEPS}"] += 1

    def _forget(self, step: int) -> None:
        del self.values[step], self.lines[step]

    def _number_of(self, row: Row) -> int | None:
        key = next((key for key in COUNTERS if key in row.values), None)
        if key is None:
            return self._last + 1 if NEXT in row.values else None
        at = number(str(row.values[key]).partition("/")[0])
        return None if at is None else int(at)

    def _of_use(self, values: Mapping[str, Any]) -> dict[str, float]:
        read = {}
        for key, value in values.items():
            name = _name(key)
            if name not in READ and not name.startswith((RAY, "fully_async/")):
                if name == "elapsed_time" and (spent := _clock(str(value))) is not None:
                    read[name] = spent
                continue
            timer = name.startswith(RAY) and name.count("/") == 1
            if (as_number := number(value)) is not None and not (timer and as_number < 0.0):
                read[name] = as_number
            else:
                self.skipped[NOT_A_NUMBER] += 1
                read |= {TORN_TIMER: 1.0} if timer else {}
        return read


def number(value: Any) -> float | None:
    """A value as a finite number, without numpy's name around it and commas between thousands; None for all else."""
    if isinstance(value, str):
        value = re.sub(r"^(?:np\.\w+|tensor)\((.*)\)$", r"\1", value)
        value = value.replace(",", "") if re.match(r"-?\d{1,3}(,\d{3})+(\.|$)", value) else value
    with suppress(TypeError, ValueError):
        return finite if math.isfinite(finite := float(value)) else None
    return None


def _name(key: str) -> str:
    """The framework's own name of a key, without what a tracker or a panel puts in front of it."""
    if RAY in key:
        return "" if key.endswith(("__MIN", "__MAX")) else key[key.index(RAY) :]
    return key.rpartition(" - ")[2].removeprefix("metrics.").removeprefix("train/")


def _clock(text: str) -> float | None:
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([dhms])", text)
    return float(sum(int(count) * units[unit] for count, unit in parts)) if parts else None
