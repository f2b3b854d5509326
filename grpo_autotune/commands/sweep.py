"""`grpo-autotune probe --rewards-only`: rewards over a network without a model, with more and more calls at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.config.schema import DataSection, RunConfig
from grpo_autotune.console import output_aside, say, show
from grpo_autotune.errors import ConfigError
from grpo_autotune.predict.calls import batch_s
from grpo_autotune.records.rewards import RemoteCalls, RewardSweep
from grpo_autotune.render.remote import render_sweep

ANSWERS = ("completion", "answer", "solution")
"""Columns that may hold what a model would write: the first that there is."""
MOST_ROWS, LEAST_ROWS, ROUNDS = 512, 8, 4
"""Rows that are read, and those asked for at a setting: at least, and for each call at once."""
ABOUT_BEST = 1.05


def show_sweep(config: RunConfig, completions: Path | None, *, as_json: bool) -> int:
    """Print what `judge` and `service` take for the texts of a file, or the data's own answers, with 1, 2, 4, ... calls
    at once, until one is answered by status 429 or a generation is asked for at once. AutotuneError where none can."""
    best, settings = dict[str, int](), list[RemoteCalls]()
    with output_aside() if as_json else nullcontext(), asyncio.Runner() as runner:
        set_environment()
        mend_torchvision()
        from grpo_autotune.train.rewards.remote.client import aclose

        rows, texts = _recorded(config, completions)
        for place in range(len(config.rewards)):
            settings += (mine := list(_settings(runner, config, place, rows, texts)))
            borne = {one.concurrency: one.step_s for one in mine if one.step_s and not one.rate_limited}
            short = [n for n, step_s in borne.items() if n and step_s <= ABOUT_BEST * min(borne.values())]
            best |= {f"rewards.{place}.concurrency": n for n in short[:1]}
        runner.run(aclose())
    if not settings:
        fix = "Without --rewards-only, `grpo-autotune probe` measures the others."
        raise ConfigError("none is a judge or a service", where="rewards", fix=fix)
    source = str(completions or f"the answers of {config.data.path}")
    sweep = RewardSweep(source=source, settings=settings, best=best)
    show(json.dumps(sweep.model_dump(mode="json"), indent=2) if as_json else render_sweep(sweep))
    return 0


def _recorded(config: RunConfig, file: Path | None) -> tuple[Any, list[str]]:
    """Rows, and the text that answers each."""
    from grpo_autotune.train.data.datasets import read_split

    data = config.data if file is None else DataSection(path=str(file), prompt_format=config.data.prompt_format)
    limit, where = min(MOST_ROWS, data.max_samples or MOST_ROWS), "--completions" if file else "data.path"
    rows = read_split(config.model_copy(update={"data": data}), data.path, data.split, limit, say, where)
    column = next((name for name in ANSWERS[: 1 if file else None] if name in rows.column_names), None)
    if column is None:
        fix = "Give --completions a file of lines with prompt, completion and the columns that rewards read."
        raise ConfigError("the data has no column with completions or answers", where=data.path, fix=fix)
    return rows, [one[-1]["content"] if isinstance(one, list) else str(one) for one in rows[column][:]]


def _settings(
    runner: asyncio.Runner, config: RunConfig, place: int, rows: Any, texts: Sequence[str]
) -> Iterator[RemoteCalls]:
    """Calls of a judge or a service with one at once and upwards, each setting with other rows."""
    from grpo_autotune.train.rewards.build import build_rewards
    from grpo_autotune.train.rewards.without_model import is_asking, keywords

    whole, begin, lanes, items = config.batch.generation_batch, 0, 1, list(config.rewards)
    per_step = config.batch.completions_per_step / config.batch.num_iterations
    while lanes and is_asking(build_rewards(config, rows.column_names)[0][place]):
        items[place] = items[place].model_copy(update={"concurrency": lanes})
        function: Any = build_rewards(config.model_copy(update={"rewards": items}), rows.column_names)[0][place]
        count = min(whole, max(LEAST_ROWS, ROUNDS * lanes))
        say(f"rewards.{place}: {count} rows with {lanes} at once")
        picked = [n % len(rows) for n in range(begin, begin + count)]
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
