"""The evaluations of a training as a table, from the lines of `train_log.jsonl`, and its checkpoints as a ranked list.

Names are the log's: `eval_...` was measured on held-out rows, the others while training; those are means over the log
events since the evaluation before; where there was none since, those of the row before.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from grpo_autotune.records.alerts import Log, number
from grpo_autotune.records.base import Document, Frozen

EVALUATIONS_FILE = "evaluations.jsonl"
NO_VALUES = ("kind", "step", "time", "epoch")
"""Keys of a log line that are no measurement."""


class Evaluation(Frozen):
    """An evaluation, on one held-out set; None where it was not logged."""

    step: int
    epoch: float | None = None
    held_out: str = ""  # name of the set; empty where there is one
    loss: float | None = None
    eval_loss: float | None = None
    eval_ppo_loss: float | None = None  # without the KL term
    eval_kl: float | None = None  # nats per token
    adv_std: float | None = None
    adv_max: float | None = None
    eval_adv_std: float | None = None
    eval_adv_max: float | None = None
    beta: dict[str, float] = {}  # by branch, under an empty name without branches
    reward: float | None = None
    eval_reward: float | None = None
    eval_reward_ci: float | None = None  # half of the interval at 95 %
    branches: dict[str, float] = {}  # held-out reward by branch
    eval_entropy: float | None = None  # nats per token
    eval_length: float | None = None  # mean tokens of a completion
    eval_truncated: float | None = None  # share
    seconds: float | None = None
    kept: str | None = None  # folder of its checkpoint, while there is one
    best: bool = False

    @property
    def series(self) -> str:
        """The held-out data in words."""
        return self.held_out or "held-out"

    @property
    def scored(self) -> float:
        """The held-out reward of a row that has one."""
        return self.eval_reward or 0.0

    @property
    def low(self) -> float:
        return self.scored - (self.eval_reward_ci or 0.0)

    @property
    def high(self) -> float:
        return self.scored + (self.eval_reward_ci or 0.0)


class SavedRow(Frozen):
    """A checkpoint, or an evaluated step whose checkpoint is gone, and its place in a ranking (None: not ranked)."""

    name: str
    step: int
    epoch: float | None
    state: str  # whole, weights only, torn, not kept
    flaw: str | None = None
    bytes: int | None = None
    links: list[str] = []  # names that point to it
    place: int | None = None
    value: float | None = None  # of the metric that ranks
    evaluation: Evaluation | None = None


class CheckpointList(Document):
    """The checkpoints of a run, ranked; the best first."""

    schema_: Literal["grpo-autotune/checkpoints/1"] = Field(default="grpo-autotune/checkpoints/1", alias="schema")
    run: str
    strategy: str | None
    metric: str | None  # name in `train_log.jsonl`
    mode: Literal["min", "max"] | None
    best: str | None
    why: str
    notes: list[str]
    rows: list[SavedRow]


class EvaluationLog:
    """Lines of a log taken one by one; `rows` are those of evaluations, each with the means of training before it."""

    def __init__(self, log: Log = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self._window: list[Mapping[str, Any]] = []
        self._trained: dict[str, Any] = {}
        for line in log:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line."""
        if line["kind"] != "eval":
            self._window.append(line)
            return
        if self._window:
            self._trained, self._window = _means(self._window), []
        timed = (re.fullmatch(r"eval_(?:(.+)_)?runtime", key) for key in line)
        name = next((match[1] for match in timed if match and match[1]), "")
        row = {**self._trained, **line, "held_out": name}
        for key in ("loss", "ppo_loss", "runtime", "samples_per_second") if name else ():
            row.setdefault(f"eval_{key}", line.get(f"eval_{name}_{key}"))
        self.rows.append(row)

    def by_step(self) -> dict[int, dict[str, Any]]:
        """The values of each evaluated step; where several sets report a name, those of the first."""
        merged: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            merged[row["step"]] = {**row, **merged.get(row["step"], {})}
        return merged

    def table(self, kept: Mapping[int, str] | None = None, best: int | None = None) -> list[Evaluation]:
        """The rows; `kept` are the folders of checkpoints by step, `best` is the step that was chosen."""
        return [_evaluation(row, (kept or {}).get(row["step"]), row["step"] == best) for row in self.rows]


def half_interval(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half of the interval of the mean of independent numbers, by Student's t; NaN for fewer than two or infinite."""
    from scipy.special import stdtrit

    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2 or any(map(math.isinf, known)):
        return math.nan
    scale = float(stdtrit(len(known) - 1, (1.0 + confidence) / 2.0))
    return scale * statistics.stdev(known) / math.sqrt(len(known))


def evaluations(log: Log) -> list[Evaluation]:
    """The evaluations of a log that scored held-out rows."""
    return [row for row in EvaluationLog(log).table() if row.eval_reward is not None]


def _means(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for line in lines:
        for key in line.keys() - NO_VALUES:
            if (value := number(line, key)) is not None:
                values.setdefault(key, []).append(value)
    return {key: math.fsum(of_key) / len(of_key) for key, of_key in values.items()}


def _evaluation(row: Mapping[str, Any], kept: str | None, best: bool) -> Evaluation:
    names = {
        "eval_length": "eval_completions/mean_length",
        "eval_truncated": "eval_completions/clipped_ratio",
        "seconds": "eval_runtime",
    }
    fields = [name for name, field in Evaluation.model_fields.items() if field.annotation == (float | None)]
    measured = {name: number(row, names.get(name, name)) for name in fields}
    beta = dict(_by_branch(row, "branch/", "/beta"))
    if not beta and (whole := number(row, "eval_beta")) is not None:
        beta = {"": whole}
    if measured["eval_reward_ci"] is None and (std := number(row, "eval_reward_std")) is not None:
        count = (measured["seconds"] or 0.0) * (number(row, "eval_samples_per_second") or 0.0)
        measured["eval_reward_ci"] = 1.96 * std / math.sqrt(max(1.0, count))  # a log that holds no interval
    branches = dict(_by_branch(row, "eval_branch/", "/reward"))
    facts = {"step": row["step"], "held_out": row["held_out"], "kept": kept, "best": best}
    return Evaluation.model_validate({**measured, **facts, "beta": beta, "branches": branches})


def _by_branch(row: Mapping[str, Any], before: str, after: str) -> Iterator[tuple[str, float]]:
    for key in row:
        if key.startswith(before) and key.endswith(after) and (value := number(row, key)) is not None:
            yield key.removeprefix(before).removesuffix(after), value
