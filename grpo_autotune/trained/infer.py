"""Completions of rows and their rewards, batch by batch, into a file that a later call goes on with."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import datasets

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.records.trained import Completion
from grpo_autotune.seams.layers import is_async
from grpo_autotune.seams.stored_images import IMAGE_COLUMNS
from grpo_autotune.train.branches.rows import branch_of_rows, judges_of
from grpo_autotune.train.data.datasets import held_out_rows, read_split
from grpo_autotune.train.rewards.build import build_rewards
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.replies import aclose
from grpo_autotune.train.rewards.without_model import keywords
from grpo_autotune.trained.completions import CompletionFile
from grpo_autotune.trained.engine import Answer, Engine, Row

LEFT_OUT = {"prompt", *IMAGE_COLUMNS}
NO_COLUMN = "--no-rewards writes completions alone."


def rows_to_complete(
    config: RunConfig, data: str | None, split: str | None, limit: int | None
) -> tuple[datasets.Dataset, str]:
    """Rows as the run's data section has them, the first `limit`, and the name of what they were read from: `data`, a
    held-out set of the run by name, or (None) the only one. ConfigError and DataError as `read_split`, and where there
    is no held-out set, or are several."""
    sets, data = config.data.held_out, config.data.path if data is None and split is not None else data
    if config.data.mix and data == config.data.path:
        raise ConfigError("it is a mixture", where="--data", fix=f"Name one: {', '.join(config.data.mix)}.")
    if data is not None and data not in sets:
        return read_split(config, data, split, limit, say, "--data"), f"{data} ({split})" if split else data
    if data is None and len(sets) != 1:
        told, fix = ("no", "Name a file.") if not sets else (f"{len(sets)}", f"Name one: {', '.join(sets)}.")
        raise ConfigError(f"the run has {told} held-out sets", where="--data", fix=fix)
    name, held_out = next(iter(sets)) if data is None else data, held_out_rows(config, say)
    rows = held_out[name] if name else held_out
    path = sets[name].path or config.data.path
    return rows.select(range(min(limit or len(rows), len(rows)))), f"{path} ({sets[name].split or 'held out'})"


class Scorer(AbstractContextManager["Scorer"]):
    """The rewards of a configuration for rows of a data set, whose branches it knows; ConfigError where a column that
    one needs is not there."""

    def __init__(self, config: RunConfig, rows: datasets.Dataset, where: str) -> None:
        self._functions: Sequence[Any] = ()
        self.branches: Sequence[str | None] = [None] * len(rows)
        try:
            self._functions, self._weights, self._names = build_rewards(config, rows.column_names, to_learn=False)
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where, fix=f"{error.fix or ''} {NO_COLUMN}".strip()) from error
        if config.branches is not None:
            self._functions = judges_of(config.branches, config.rewards, self._functions)
        self.sort(config, rows, where)
        self._runner = asyncio.Runner()

    def sort(self, config: RunConfig, rows: datasets.Dataset, where: str) -> None:
        """Take note of the rows' branches, of those that are left."""
        if config.branches is not None:
            self.branches = branch_of_rows(config.branches, rows, where)

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """The fields `rewards`, `failed` and `total` of each completion."""
        given = {"completions": [one.completion for one in answers], "completion_ids": [one.ids for one in answers]}
        batch = {**keywords(rows, [one.text for one in answers]), **given}
        values: list[Any] = [None if is_async(function) else function(**batch) for function in self._functions]
        awaited = [place for place, function in enumerate(self._functions) if is_async(function)]
        for place, result in zip(awaited, self._runner.run(self._awaited(batch, awaited)), strict=True):
            values[place] = result
        for row in range(len(rows)):
            yield self._fields([column[row] for column in values])

    async def _awaited(self, batch: dict[str, Any], places: Sequence[int]) -> list[Any]:
        return await asyncio.gather(*(self._functions[place](**batch) for place in places))

    def _fields(self, values: Sequence[float | None]) -> dict[str, Any]:
        rewards = [None if value is None or not math.isfinite(value) else value for value in values]
        failed = [name for name, value in zip(self._names, values, strict=True) if value is FAILED]
        parts = [w * value for w, value in zip(self._weights, rewards, strict=True) if value is not None]
        total = sum(parts) if parts and not failed else None
        return {"rewards": dict(zip(self._names, rewards, strict=True)), "failed": failed, "total": total}

    def __exit__(self, *exc: object) -> None:
        self._runner.run(aclose())
        self._runner.close()


@dataclass(frozen=True)
class Work:
    """The completions to write: `n` of each row, in batches of some `prompts`, longest first."""

    rows: datasets.Dataset
    n: int
    prompts: int
    seed: int
    scorer: Scorer
    file: CompletionFile

    def batches(self) -> list[list[int]]:
        """Numbers of the rows of each batch in which something is left to do; the batches are always the same."""
        lengths = [len(str(prompt)) for prompt in self.rows["prompt"][:]]
        order, done = sorted(range(len(lengths)), key=lambda row: -lengths[row]), self._done()
        batches = [order[at : at + self.prompts] for at in range(0, len(order), self.prompts)]
        return [batch for batch in batches if {(row, i) for row in batch for i in range(self.n)} - done]

    def write(self, engine: Engine, tell: Callable[[int], None]) -> tuple[int, float | None]:
        """Write the completions that are missing, and `tell` the number of batches done after each; how many they are,
        and tokens per second of generation."""
        done, tokens, spent_s = self._done(), 0, 0.0
        for number, batch in enumerate(self.batches(), start=1):
            rows, begun = [self.rows[row] for row in batch], time.perf_counter()
            answers = engine.write(rows, [self.seed + row * self.n for row in batch])
            spent_s += time.perf_counter() - begun
            tokens += sum(len(one.ids) for one in answers)
            completions = self._completions(batch, rows, answers)
            self.file.add([one for one in completions if (one.row, one.sample) not in done])
            tell(number)
        return len(self.file.completions) - len(done), tokens / spent_s if spent_s else None

    def _done(self) -> set[tuple[int, int]]:
        return {(one.row, one.sample) for one in self.file.completions}

    def _completions(
        self, batch: Sequence[int], rows: Sequence[Row], answers: Sequence[Answer]
    ) -> Iterator[Completion]:
        places = [divmod(place, self.n) for place in range(len(answers))]
        scores = self.scorer([rows[row] for row, _ in places], answers)
        for (row, sample), answer, fields in zip(places, answers, scores, strict=True):
            yield Completion(
                row=batch[row],
                sample=sample,
                prompt=answer.prompt,
                completion=answer.text,
                tokens=len(answer.ids),
                truncated=answer.truncated,
                branch=self.scorer.branches[batch[row]],
                columns={name: value for name, value in rows[row].items() if name not in LEFT_OUT},
                **fields,
            )
