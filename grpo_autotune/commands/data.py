"""`grpo-autotune data`: what the model will see of a configuration's data, and what rewards say of its references."""

import asyncio
import inspect
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.commands.sweep import ANSWERS
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.console import output_aside, say, show
from grpo_autotune.errors import AutotuneError, ConfigError
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.records.data import DataView, ReferenceScores, ShownImage, ShownRow
from grpo_autotune.registry import resolve
from grpo_autotune.render.data import render_data
from grpo_autotune.seams.layers import is_async
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.seams.trainer_access import image_tokens
from grpo_autotune.units import plural

LOOKED_AT, WITH_IMAGES = 400, 40
"""Rows whose tokens are counted and whose references are scored, beside those shown."""
NARROWEST = 60

Row = Mapping[str, Any]


def show_data(config: RunConfig, *, count: int, asked: Sequence[int], full: bool, as_json: bool) -> int:
    """Print `count` rows (the first, the last and random ones), or those `asked` for, as the trainer tokenizes them,
    and the scores of reference answers. The processor is loaded, and no weights; a judge or a service is not asked."""
    with output_aside() if as_json else nullcontext():
        set_environment()
        mend_torchvision()
        view = _view(config, count, asked)
    width = max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)
    show(view.model_dump_json(indent=2) if as_json else render_data(view, width, full=full))
    return 0


def _view(config: RunConfig, count: int, asked: Sequence[int]) -> DataView:
    from grpo_autotune.train.branches.rows import divided
    from grpo_autotune.train.data.datasets import load_data
    from grpo_autotune.train.data.lengths import within_limit
    from grpo_autotune.train.data.templates import fit_prompts
    from grpo_autotune.train.models.load import check_images, load_processor, model_source
    from grpo_autotune.train.rewards.build import KEPT_BY_TRL, build_rewards
    from grpo_autotune.train.runs.quiet import quieten

    quieten(bars=False)
    train, held_out = load_data(config, say)
    functions, _, names = build_rewards(config, train.column_names)
    if config.branches is not None:
        train, held_out, functions = divided(config, train, held_out, functions, say)
    processor = load_processor(config.model, model_source(config.model, say))
    check_images(processor, train.column_names)
    options = grpo_value("chat_template_kwargs", config) or {}
    train = fit_prompts(train, processor, options, config.data.path, say, config.data)
    sets = dict(held_out) if isinstance(held_out, Mapping) else {} if held_out is None else {"": held_out}
    for name, one in sets.items():
        sets[name] = within_limit(one, processor, options, config.data, f"held-out data {name}".rstrip(), say)
    order = random.Random(0).sample(range(len(train)), len(train))
    if beyond := [number for number in asked if number >= len(train)]:
        raise ConfigError(f"there are {len(train)} rows", where=f"--row {beyond[0]}", fix="Count from 0.")
    shown = sorted(set(asked) or list(dict.fromkeys([0, len(train) - 1, *order]))[:count])
    sample = order[: WITH_IMAGES if image_columns(train.column_names) else LOOKED_AT]
    rows = {number: train[number] for number in sorted({*shown, *sample})}
    ids = {number: _prompt_ids(processor, row, options) for number, row in rows.items()}
    columns = [name for name in train.column_names if name not in KEPT_BY_TRL]
    scored = [
        _scored(item, function, name, columns, rows, processor)
        for item, function, name in zip(config.rewards, functions, names, strict=True)
    ]
    used = {"dataset" for _ in config.data.mix}.union(*({one.reference, *one.reads} for one in scored))
    return DataView(
        source=config.data.path,
        rows=len(train),
        held_out={name: len(one) for name, one in sets.items()},
        columns=train.column_names,
        prompt_tokens={number: len(one) for number, one in ids.items()},
        shown=[
            ShownRow(
                row=number,
                text=_text(processor, ids[number]),
                images=[
                    ShownImage(width=image.width, height=image.height, tokens=image_tokens(processor, *image.size))
                    for image in _images(rows[number])
                ],
                columns={name: str(rows[number][name]) for name in columns if name in used},
            )
            for number in shown
        ],
        rewards=scored,
    )


def _prompt_ids(processor: Any, row: Row, options: Mapping[str, Any]) -> Sequence[int]:
    """Token ids of a row's prompt."""
    from grpo_autotune.trained.prompts import inputs_of, prompt_of

    ids: Sequence[int] = inputs_of(prompt_of(row, processor), processor, options)["input_ids"][0].tolist()
    return ids


def _images(row: Row) -> list[Any]:
    held = [row[name] for name in image_columns(row.keys())]
    return [image for one in held for image in (one if isinstance(one, list) else [one]) if image is not None]


def _text(processor: Any, ids: Sequence[int]) -> str:
    """Tokens as text; of several image tokens in a row, one and their number."""
    text = str(getattr(processor, "tokenizer", processor).decode(ids))
    sign = getattr(processor, "image_token", None)
    return re.sub(f"({re.escape(sign)})+", lambda run: f"{sign} x{len(run[0]) // len(sign)}", text) if sign else text


def _scored(
    item: RewardItem,
    function: Callable[..., Any],
    name: str,
    columns: Sequence[str],
    rows: Mapping[int, Row],
    processor: Any,
) -> ReferenceScores:
    """The scores of one reward for the reference answers of rows, given by their number."""
    from grpo_autotune.train.rewards.without_model import is_asking, keywords

    reads = _reads(item, function, columns)
    its_column = next((column for column in (item.params.get("column"), *ANSWERS, *reads) if column in reads), None)
    reference = its_column or next((column for column in ANSWERS if column in columns), None)
    texts = {number: str(row[reference]) for number, row in rows.items() if reference and row[reference] is not None}
    note = None if texts else "the data has no reference answer"
    if is_asking(function):
        texts, note = {}, "not asked: it calls an endpoint (`grpo-autotune probe --rewards-only` does)"
    scores = dict[int, float | None]()
    if texts:
        encoded = getattr(processor, "tokenizer", processor)(list(texts.values()), add_special_tokens=False)
        batch = keywords([rows[number] for number in texts], list(texts.values()))
        try:
            result: Any = function(**{**batch, "completion_ids": encoded["input_ids"]})
            result = asyncio.run(result) if is_async(function) else result
            scores = {n: None if v is None else float(v) for n, v in zip(texts, result, strict=True)}
        except AutotuneError as error:
            note = str(error)
    values = {number: value for number, value in scores.items() if value is not None and math.isfinite(value)}
    is_ours = resolve("reward", item.name).__module__.startswith("grpo_autotune.")  # with a best score of 1
    best = max([*values.values(), *[1.0][:is_ours]], default=1.0)
    below = [number for number, value in values.items() if its_column and value < best - 1e-9]
    if scores and not values:
        note = "it gives no score to any"
    elif below:
        note = f"its own reference has less than {best:g} in {plural(len(below), 'row')}, the first row {below[0]}"
    scores = {number: values.get(number) for number in scores}
    return ReferenceScores(name=name, reads=reads, reference=reference if texts else None, scores=scores, note=note)


def _reads(item: RewardItem, function: Any, columns: Sequence[str]) -> list[str]:
    """Columns that a reward names: as parameters of its own, in its `column`, in a judge's or a service's templates."""
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(ValueError):  # a callable of another language shows no signature
        parameters = inspect.signature(resolve("reward", item.name)).parameters
    named = {*parameters, *getattr(getattr(function, "remote", None), "columns", ())} - item.params.keys()
    by_default = parameters["column"].default if "column" in parameters else None
    return [name for name in columns if name in named or name == item.params.get("column", by_default)]
