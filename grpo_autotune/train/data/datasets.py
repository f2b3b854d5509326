"""A configuration's data section -> rows as TRL wants them: `prompt`, images, and columns for rewards.

Text is rearranged here and nothing else: image columns are passed on as they are stored, so nothing is decoded or
copied that need not be.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from grpo_autotune.config.reward_arguments import GIVEN_BY_TRL
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.errors import ConfigError, DataError, nearest_hint
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.train.data.images import prepare_images
from grpo_autotune.train.data.pictures import lift
from grpo_autotune.train.data.prompts import shaped, with_prompts
from grpo_autotune.train.data.sources import read_rows
from grpo_autotune.train.models.load import size_check

Splits = tuple[datasets.Dataset, Any]
Choose = Callable[[datasets.Dataset], datasets.Dataset]
LoadData = Callable[[RunConfig, Callable[[str], None]], Splits]


def load_data(config: RunConfig, progress: Callable[[str], None], choose: Choose = lambda rows: rows) -> Splits:
    """Training rows, and held-out rows: a data set, several by name as `data.eval` has them, or None.

    Rows have `prompt` (messages, or text with `prompt_format: text`), `image` or `images` where the data has any, and
    all other columns; of each set those that `choose` leaves of it. ConfigError where the data, a split or a column is
    not there, or there are too few rows for one generation; DataError where there are no rows, or one, which it names
    (counted from 0), cannot be used."""
    data = config.data
    train = read_split(config, data.path, data.split, data.max_samples, progress, "data.path", choose)
    check_rows(config, len(train))
    held_out = {}
    for name, one in data.held_out.items():
        key = f"data.eval.{name}.path" if name else "data.eval_path"
        path, limit = one.path or data.path, data.max_eval_samples
        held_out[name] = read_split(config, path, one.split, limit, progress, key, choose)
    return train, held_out.get("", held_out) or None


def check_rows(config: RunConfig, rows: int) -> None:
    """ConfigError where a generation takes more different prompts than there are rows."""
    wanted = config.batch.prompts_per_generation
    if rows < wanted:
        raise ConfigError(
            f"{config.data.path} has {rows} rows, and a generation takes {wanted} different prompts (generation batch "
            f"{config.batch.generation_batch} / num_generations {config.batch.num_generations})",
            where="data",
            fix=f"Give at least {wanted} rows, or lower grpo.per_device_train_batch_size or grpo.steps_per_generation.",
        )


def read_split(
    config: RunConfig,
    path: str,
    split: str | None,
    limit: int | None,
    progress: Callable[[str], None],
    key: str,
    choose: Choose = lambda rows: rows,
) -> datasets.Dataset:
    """Rows of one split as `load_data` gives them, at most `limit`; `key` names `path` in the configuration."""
    data = config.data
    progress(f"reading {path}{f' ({split})' if split else ''}")
    more: dict[str, Any] = {"name": data.name, "revision": data.revision, "params": data.params}
    rows = read_rows(path, split, where=key, **(more if path == data.path else {}))
    if len(rows) == 0:
        raise DataError("the data set is empty", where=f"{path}{f', split {split}' if split else ''}")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    rows = choose(rows)
    place = Path(path).expanduser()
    base = place.parent if place.is_file() else place if place.is_dir() else Path()
    finished, held = _columns(rows, data, path)
    try_size = size_check(config.model, progress)
    return prepare_images(finished, data.image_size, base.absolute(), path, progress, held, try_size)


def _columns(rows: datasets.Dataset, data: DataSection, where: str) -> tuple[datasets.Dataset, list[list[Any]]]:
    """Rows under our column names, with `prompt` as TRL takes it, and the images that each row's messages held."""
    for ours, theirs in data.columns.items():
        if theirs not in rows.column_names:
            raise _missing(theirs, rows, f"data.columns.{ours}")
    renamed = _renamed(rows, data.columns)
    taken = sorted(GIVEN_BY_TRL.intersection(renamed.column_names))
    if taken:
        raise ConfigError(
            f"the column {taken[0]} has a name that TRL uses itself",
            where=where,
            fix=f"Give it another, for instance data.columns: {{my_{taken[0]}: {taken[0]}}}.",
        )
    pictured = bool(image_columns(renamed.column_names))
    if data.prompt_format == "text" and (pictured or data.system_prompt is not None):
        kind = "pictures" if pictured else "data.system_prompt"
        raise ConfigError(f"text that is taken as it is has no place for {kind}", where="data.prompt_format")
    prompts = [
        shaped(prompt, data, f"{where}, row {row}", pictured=pictured) for row, prompt in _prompts(rows, renamed, data)
    ]
    lifted = [(prompt, []) if isinstance(prompt, str) else lift(prompt) for prompt in prompts]
    return with_prompts(renamed, [prompt for prompt, _ in lifted], where), [held for _, held in lifted]


def _renamed(rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    """Mapped columns under our names, beside all others; an unmapped column gives way to a mapped one of its name."""
    used = {*columns, *columns.values()}
    others = [name for name in rows.column_names if name not in used]
    parts = [rows.select_columns(others)] if others else []
    for ours, theirs in columns.items():
        column = rows.select_columns([theirs])
        parts.append(column if ours == theirs else column.rename_column(theirs, ours))
    return datasets.concatenate_datasets(parts, axis=1)


def _prompts(rows: datasets.Dataset, renamed: datasets.Dataset, data: DataSection) -> Iterator[tuple[int, Any]]:
    """Row number and prompt, as it stands in the data or as the template makes it from columns of either name."""
    if data.prompt_template is None:
        if "prompt" not in renamed.column_names:
            raise _missing("prompt", rows, "data.columns.prompt")
        yield from enumerate(renamed["prompt"][:])
        return
    values = {}
    for field in _fields(data.prompt_template):
        source = renamed if field in renamed.column_names else rows
        if field not in source.column_names:
            raise _missing(field, rows, "data.prompt_template")
        values[field] = source[field][:]
    for row in range(len(rows)):
        cells = {field: column[row] for field, column in values.items()}
        try:
            if None in cells.values():
                raise ValueError("a column that it names is empty there")
            prompt = data.prompt_template.format(**cells)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"does not fit row {row}: {error}", where="data.prompt_template") from error
        yield row, prompt


def _fields(template: str) -> list[str]:
    """Names of the columns in a template; ConfigError if it is not a format string over plain names."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        flaw = next((f"{{{field}}} is not the name of a column" for field in fields if not field.isidentifier()), "")
    except ValueError as error:
        flaw = f"not a format string: {error}"
    if flaw:
        raise ConfigError(flaw, where="data.prompt_template", fix="Write a literal brace twice: {{ or }}.")
    return fields


def _missing(column: str, rows: datasets.Dataset, where: str) -> ConfigError:
    hint = nearest_hint(column, rows.column_names)
    if column == "prompt":
        hint += " Map one with data.columns.prompt, or write data.prompt_template."
    return ConfigError(
        f"the data has no column {column}", where=where, fix=f"{hint} Columns: {', '.join(rows.column_names)}."
    )
