"""The search against an exhaustive sweep, replayed for many seeds: how close to the best it comes, for what share of
the sweep's time; and samplers alone at the same budget.

    python -m benchmarks.search_replay [SEEDS] [SHARE ...]

A replayed trial takes the time that the measured one took, on a clock that only trials move, and gives its measured
steps, drawn anew with the seed. Ours is the whole search, probe, own configuration, worst case and race included; TPE,
GP and random search propose from the same legal points and spend the whole budget on trials, once their worker has
started. All are judged by the best configuration they end with, at its median over all its measured steps, and by when
they first measured one within `CLOSE` of the best there is.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from benchmarks.result import ratio, write
from benchmarks.sweep import RECORDS
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine, detect
from grpo_autotune.knobs import Knobs, knobs_of
from grpo_autotune.predict.models import Models
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.trial import Progress, TrialOutcome, TrialSpec
from grpo_autotune.search.leaderboard import Leaderboard
from grpo_autotune.search.session import search
from grpo_autotune.search.study import Axes, Sampler, Study, name_of

SHARES = (0.12, 0.05, 0.03)
"""Of the sweep's time that each method may spend."""
REPEATABLE = [[1]]
"""Some lengths of the probe's completions: which they are is nothing to a replay, but trials of one process can repeat
them, so that the probe is the user's own trial."""
CLOSE = 0.03
SAMPLERS: tuple[Sampler, ...] = ("tpe", "gp", "random")


class Sweep:
    """The stored rows, by combination."""

    def __init__(self, path: Path = RECORDS) -> None:
        with gzip.open(path, "rt") as file:
            stored = json.load(file)
        self.config = RunConfig.from_dict({"speedups": "none", **stored["config"]})
        self.probe, *self.rows = stored["rows"]
        self.by_name = {name_of(row["knobs"]): row for row in self.rows}
        self.record = ProbeRecord.model_validate(self.probe["record"])
        self.own = knobs_of(self.config, self.rows[0]["knobs"])
        self.board = Leaderboard(self.config, self.own, self.record)
        self.seconds = sum(row["elapsed_s"] for row in self.rows)

    def score(self, knobs: Knobs) -> float:
        """True score of a combination; 0 where it failed."""
        row = self.by_name[name_of(knobs)]
        if row["status"] != "ok":
            return 0.0
        return self.board.score(self.board.config_of(knobs), statistics.median(row["step_s"]))

    @cached_property
    def best(self) -> float:
        """Of all combinations."""
        return max(self.score(row["knobs"]) for row in self.rows)

    def is_close(self, knobs: Knobs) -> bool:
        """Whether a combination is as good as the best, but for `CLOSE`."""
        return self.score(knobs) >= (1.0 - CLOSE) * self.best


class Replay:
    """Trials that repeat what the sweep measured."""

    has_pair = False

    def __init__(self, sweep: Sweep, seed: int, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self.random = np.random.default_rng(seed)
        self.now, self.close_at_s = 0.0, math.inf

    def clock(self) -> float:
        """Seconds of all trials so far."""
        return self.now

    def run(self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None) -> TrialOutcome:
        """A measured trial again, its steps drawn anew."""
        row = self.sweep.probe if spec.purpose == "probe" else self.sweep.by_name[name_of(spec.knobs)]
        folder = self.folder / "trials" / f"{spec.number:04d}"
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.model_dump_json())
        beside_s = _beside_s(row)
        steps = [float(s) for s in self.random.choice(row["step_s"], spec.steps)] if row["step_s"] else []
        if spec.enough_s is not None and spec.least_steps is not None:
            trained_s = np.cumsum([statistics.median(steps or [0.0]), *steps])[1:]  # a step to warm up before
            enough = next((n for n, s in enumerate(trained_s, 1) if n >= spec.least_steps and s >= spec.enough_s), None)
            steps = steps[:enough]
        outcome = TrialOutcome(
            number=spec.number,
            status=row["status"],
            why=row["why"],
            record=None if row["record"] is None else ProbeRecord.model_validate(row["record"]),
            step_s=steps,
            peak_bytes=row["peak_bytes"],
            idle_bytes=row["idle_bytes"],
            elapsed_s=beside_s + sum(steps),
            warm=row["warm"],
            lengths=REPEATABLE if spec.purpose == "probe" else [],
        )
        if outcome.elapsed_s > spec.limit_s:
            outcome = TrialOutcome(number=spec.number, status="timeout", elapsed_s=spec.limit_s)
        self.now += outcome.elapsed_s
        if spec.purpose == "timed" and self.sweep.is_close(spec.knobs):
            self.close_at_s = min(self.close_at_s, self.now)
        (folder / "outcome.json").write_text(outcome.model_dump_json())
        return outcome

    def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]:
        """So many rounds, each process started once."""
        return [self.run(spec.model_copy(update={"steps": rounds, "limit_s": deadline_s})) for spec in specs]

    def close(self) -> None:
        """Nothing is open."""


class End(NamedTuple):
    """What a method ends with, the seconds it took, and those until it first measured one that is close to the best
    (infinite where it never did)."""

    knobs: Knobs
    spent_s: float
    close_at_s: float


class Silent:
    """A view that shows nothing."""

    def show(self, state: Any) -> None:
        """Nothing."""


def ours(sweep: Sweep, budget_s: float, machine: Machine, sampler: Sampler, seed: int) -> End:
    """The whole search."""
    values = sweep.config.to_dict()
    values["search"] = {**values["search"], "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(sweep, seed, Path(folder))
        report = search(
            RunConfig.from_dict(values),
            budget_s=budget_s,
            out=None,
            run_dir=Path(folder),
            view=Silent(),
            runner=lambda path: replay,
            fit=Models.from_probe,
            sampler=sampler,
            clock=replay.clock,
            machine=machine,
        )
        return End(report.best_fast.knobs, replay.now, replay.close_at_s)


def cold_start_s(sweep: Sweep) -> float:
    """What the first worker of any search takes to start: the probe's had to, those of the sweep's points were warm."""
    own = sweep.by_name[name_of(sweep.own)]
    return float(max(0.0, _beside_s(sweep.probe) - _beside_s(own)))


def _beside_s(row: dict[str, Any]) -> float:
    return float(max(0.0, row["elapsed_s"] - sum(row["step_s"])))


def alone(sweep: Sweep, budget_s: float, sampler: Sampler, seed: int) -> End:
    """One of Optuna's samplers from the user's configuration on, until the next trial would not fit."""
    axes = Axes.of({key: tuple(_values(sweep, key)) for key in sweep.own})
    study = Study(optuna.storages.InMemoryStorage(), axes, "", where="memory", seed=seed, sampler=sampler)
    close_at_s, first = math.inf, True
    rng, spent_s, best, left = np.random.default_rng(seed), cold_start_s(sweep), (0.0, sweep.own), dict(sweep.by_name)
    while left:
        asked = study.ask(sweep.own) if first else study.suggest([row["knobs"] for row in left.values()])
        row = left.pop(name_of(asked.knobs))
        if spent_s + row["elapsed_s"] > budget_s:
            return End(best[1], spent_s, close_at_s)
        first = False
        spent_s += row["elapsed_s"]
        if sweep.is_close(asked.knobs):
            close_at_s = min(close_at_s, spent_s)
        if row["status"] != "ok":
            study.tell_infeasible(asked, len(left), {}, over_gib=1.0)
            continue
        step_s = float(np.median(rng.choice(row["step_s"], len(row["step_s"]))))
        score = sweep.board.score(sweep.board.config_of(asked.knobs), step_s)
        study.tell(asked, score, len(left), {}, 1.0)
        best = max(best, (score, asked.knobs), key=lambda pair: pair[0])
    return End(best[1], spent_s, close_at_s)


def _values(sweep: Sweep, key: str) -> list[Any]:
    found = {json.dumps(row["knobs"][key]): row["knobs"][key] for row in sweep.rows}
    return list(found.values())


def main() -> None:
    """Replay and write."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    shares = [float(word) for word in sys.argv[2:]] or list(SHARES)
    sweep, machine = Sweep(), detect()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    for share in shares:
        for name, method in methods(sweep, share * sweep.seconds, machine).items():
            found = [_row(sweep, name, share, seed, method(seed)) for seed in range(seeds)]
            rows += found
            scores = [row["score_share"] for row in found]
            close = [row["close_at_share"] for row in found]
            ratios[f"{name}, {share:.0%} of the sweep's time: score over the best"] = ratio(scores)
            ratios[f"{name}, {share:.0%}: share of the time until one within {CLOSE:.0%} was measured"] = ratio(close)
            gaps = np.percentile([1.0 - value for value in scores], [50, 90])
            below = f"{gaps[0]:.1%} below the best at the median, {gaps[1]:.1%} at p90"
            when = f"close to it after {np.median(close):.1%} (p90 {np.percentile(close, 90):.1%})"
            sys.stdout.write(f"{name}, {share:.0%} of the sweep's time: {below}; {when}\n")
            sys.stdout.flush()
    command = f"python -m benchmarks.search_replay {seeds} {' '.join(map(str, shares))}"
    sys.stdout.write(f"{write('search_replay', command, rows, ratios)}\n")


def methods(sweep: Sweep, budget_s: float, machine: Machine) -> dict[str, Callable[[int], End]]:
    """The search with either sampler, and each sampler alone; from a seed to what it ends with."""
    found: dict[str, Callable[[int], End]] = {}
    for sampler in SAMPLERS[:2]:
        found[f"ours ({sampler})"] = functools.partial(ours, sweep, budget_s, machine, sampler)
    for sampler in SAMPLERS:
        found[f"{sampler} alone"] = functools.partial(alone, sweep, budget_s, sampler)
    return found


def _row(sweep: Sweep, name: str, share: float, seed: int, end: End) -> dict[str, Any]:
    return {
        "method": name,
        "budget_share": share,
        "seed": seed,
        "score_share": sweep.score(end.knobs) / sweep.best,
        "time_share": end.spent_s / sweep.seconds,
        "close_at_share": min(end.close_at_s / sweep.seconds, share),
        "came_close": end.close_at_s < math.inf,
    }


if __name__ == "__main__":
    main()
