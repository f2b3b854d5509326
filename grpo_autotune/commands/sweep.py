"""`grpo-autotune probe --rewards-only`: rewards over a network without a model, with more and more calls at once."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import judged_branches
from grpo_autotune.console import output_aside, say, show
from grpo_autotune.errors import ConfigError
from grpo_autotune.predict.calls import batch_s
from grpo_autotune.records.rewards import RemoteCalls, Sweep
from grpo_autotune.render.remote import render_sweep

ANSWERS = ("completion", "answer", "solution")
"""Columns that may hold what a model would write: the first that there is."""
MOST_ROWS, LEAST_ROWS, ROUNDS = 512, 8, 4
"""Rows that are read, and those asked for at a setting: at least, and for each call at once."""


def show_sweep(config: RunConfig, *, as_json: bool) -> int:
    """Print what `judge` and `service` take for the completions or answers of the data with 1, 2, 4, ... calls at once,
    until one is answered by status 429 or a generation is asked for at once. AutotuneError where none can be asked."""
    with output_aside() if as_json else nullcontext(), asyncio.Runner() as runner:
        set_environment()
        mend_torchvision()
        from grpo_autotune.train.data.datasets import training_rows
        from grpo_autotune.train.rewards.remote.replies import aclose

        rows = training_rows(config, say, lambda rows: rows.select(range(min(MOST_ROWS, len(rows)))))
        column = next((name for name in ANSWERS if name in rows.column_names), None)
        if column is None:
            raise ConfigError(
                f"the data has no column {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}", where=config.data.path
            )
        texts = list(map(str, rows[column][:]))
        of_reward = _rows_of_rewards(config, rows)
        settings = [
            one
            for place in range(len(of_reward))
            for one in _settings(runner, config, place, rows, texts, of_reward[place])
        ]
        runner.run(aclose())
    if not settings:
        fix = "Without --rewards-only, `grpo-autotune probe` measures the others."
        raise ConfigError("none is a judge or a service", where="rewards", fix=fix)
    swept = Sweep(source=f"column {column} of {config.data.path}", settings=settings)
    show(swept.model_dump_json(indent=2) if as_json else render_sweep(swept.settings, swept.source))
    return 0


def _rows_of_rewards(config: RunConfig, rows: Any) -> list[list[int]]:
    """The numbers of the rows that each reward is asked about: those of its branches, or all."""
    from grpo_autotune.train.branches.rows import branch_of_rows

    if config.branches is None:
        return [[*range(len(rows))] for _ in config.rewards]
    of_rows = branch_of_rows(config.branches, rows, config.data.path)
    judged = judged_branches(config.branches, config.rewards)
    return [[row for row, name in enumerate(of_rows) if name in names] for names in judged]


def _settings(
    runner: asyncio.Runner, config: RunConfig, place: int, rows: Any, texts: Sequence[str], asked: Sequence[int]
) -> Iterator[RemoteCalls]:
    """Calls of a judge or a service with one at once and upwards, each setting with other rows of those `asked`."""
    from grpo_autotune.train.rewards.build import build_rewards
    from grpo_autotune.train.rewards.without_model import is_asking, keywords

    whole, begin, lanes, items = config.batch.generation_batch, 0, 1, list(config.rewards)
    per_step = config.batch.completions_per_step / config.batch.num_iterations * len(asked) / len(rows)
    while lanes and asked and is_asking(build_rewards(config, rows.column_names)[0][place]):
        items[place] = items[place].model_copy(update={"concurrency": lanes})
        function: Any = build_rewards(config.model_copy(update={"rewards": items}), rows.column_names)[0][place]
        count = min(whole, max(LEAST_ROWS, ROUNDS * lanes))
        say(f"rewards.{place}: {count} rows with {lanes} at once")
        picked = [asked[n % len(asked)] for n in range(begin, begin + count)]
        batch = keywords([rows[n] for n in picked], [texts[n] for n in picked])
        function.remote.cache = None  # what an earlier setting asked would take no time
        runner.run(function.remote.warm_up(batch))
        function.remote.reset()
        runner.run(function(**batch))
        calls = function.remote.calls()
        step_s = batch_s(calls, lanes, rows=whole) * per_step / whole
        cost = None if calls.cost is None else calls.cost / count * per_step
        yield calls.model_copy(update={"place": place, "concurrency": lanes, "step_s": step_s, "cost_per_step": cost})
        begin, lanes = begin + count, 0 if calls.rate_limited or lanes == whole else min(2 * lanes, whole)
