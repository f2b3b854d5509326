"""A configuration's data section -> rows as TRL wants them: `prompt`, images, and columns for rewards.

Text is rearranged here and nothing else: image columns are passed on as they are stored, so nothing is decoded or
copied that need not be.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import datasets

from grpo_autotune.config.reward_arguments import GIVEN_BY_TRL
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.data import IMAGE_LIMITS, DataSection, HeldOut, Source
from grpo_autotune.errors import ConfigError, DataError, nearest_hint, with_row_numbers
from grpo_autotune.seams.stored_images import Limits, image_columns
from grpo_autotune.train.data.images import prepare_images
from grpo_autotune.train.data.mixing import drawn, in_proportion, mixed
from grpo_autotune.train.data.nested import head_of, nested_column
from grpo_autotune.train.data.pictures import lift
from grpo_autotune.train.data.prompt_templates import NOT_FIT, compiled
from grpo_autotune.train.data.prompts import shaped, with_prompts
from grpo_autotune.train.data.sources import read_rows
from grpo_autotune.train.models.load import size_check

Splits = tuple[datasets.Dataset, Any]
Choose = Callable[[datasets.Dataset], datasets.Dataset]
Draw = Literal["to train on", "held out"]
TRAIN, HELD_OUT = get_args(Draw)
LoadData = Callable[[RunConfig, Callable[[str], None]], Splits]


def load_data(config: RunConfig, progress: Callable[[str], None], choose: Choose = lambda rows: rows) -> Splits:
    """Training rows, and held-out rows: a data set, several by name as `data.eval` has them, or None.

    Rows have `prompt` (messages, or text with `prompt_format: text`), `image` or `images` where the data has any, and
    all other columns; of each set those that `choose` leaves of it. Those of a mixture are an epoch in its proportions,
    the held-out ones one set. ConfigError where the data, a split or a column is not there, or there are too few rows
    for one generation; DataError where there are no rows, or one, which it names (counted from 0), cannot be used."""
    train = training_rows(config, progress, choose)
    check_rows(config, len(train))
    return train, held_out_rows(config, progress, choose)


def training_rows(
    config: RunConfig, progress: Callable[[str], None], choose: Choose = lambda rows: rows
) -> datasets.Dataset:
    """Rows to train on, as `load_data` has them, however few."""
    data, parts = config.data, []
    for place, one in data.sources.items():
        key = f"{place}.path"
        parts.append(read_split(config, one.path, one.split, one.max_samples, progress, key, choose, one, draw=TRAIN))
    if not data.mix:
        return parts[0]
    rows = in_proportion(data, mixed(dict(zip(data.mix, parts, strict=True))), progress)
    return _some(rows, data, data, TRAIN, progress, data.max_samples)[0]


def held_out_rows(config: RunConfig, progress: Callable[[str], None], choose: Choose = lambda rows: rows) -> Any:
    """Held-out rows, as `load_data` has them."""
    data, sets = config.data, dict[str, list[datasets.Dataset]]()
    for place, one in data.sources.items():
        for name, split in one.held_out.items():
            key = f"{place}.eval.{name}.path" if name else f"{place}.eval_path"
            path, part, draw = split.path or one.path, split.split, None
            if split == HeldOut():  # cut by `split_ratio`
                part, draw = one.split, HELD_OUT
            rows = read_split(config, path, part, one.max_eval_samples, progress, key, choose, one, draw=draw)
            sets.setdefault(name, []).append(rows)
    if data.mix and sets:
        names = [name for name, part in data.mix.items() if part.held_out]
        return mixed(dict(zip(names, sets[""], strict=True)))
    held_out = {name: rows for name, (rows,) in sets.items()}
    return held_out.get("", held_out) or None


def first_rows(config: RunConfig, count: int, progress: Callable[[str], None]) -> tuple[datasets.Dataset, str]:
    """The first `count` held-out rows, of the first set of several, or else training rows, and their kind in a word."""

    def first(rows: datasets.Dataset) -> datasets.Dataset:
        return rows.select(range(min(count, len(rows))))

    rows = held_out_rows(config, progress, first)
    kind = "training" if rows is None else "held-out"
    rows = training_rows(config, progress, first) if rows is None else rows
    return first(next(iter(rows.values())) if isinstance(rows, dict) else rows), kind


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
    source: Source | None = None,
    *,
    draw: Draw | None = None,
) -> datasets.Dataset:
    """Rows of one split as `load_data` gives them, at most `limit`; `key` names `path` in the configuration, of which
    `source` (the data section, or a part of its mixture) says how they are read, and which of them are drawn."""
    data = config.data if source is None else source
    progress(f"reading {path}{f' ({split})' if split else ''}")
    more: dict[str, Any] = {"name": data.name, "revision": data.revision, "params": data.params}
    rows = read_rows(path, split, where=key, **(more if path == data.path else {}))
    if len(rows) == 0:
        raise DataError("the data set is empty", where=f"{path}{f', split {split}' if split else ''}")
    kept, numbers = _some(rows, data, config.data, draw, progress, limit)
    rows = choose(kept)
    place = Path(path).expanduser()
    base = place.parent if place.is_file() else place if place.is_dir() else Path()
    root = base if data.image_root is None else Path(data.image_root).expanduser()
    limits = Limits(*(getattr(config.data, key) or getattr(data, key) for key in IMAGE_LIMITS))
    with _numbered(numbers if rows is kept else {}, progress) as tell:
        finished, held = _columns(rows, data, path, key.partition(".eval")[0].removesuffix(".path"))
        try_size = size_check(config.model, tell)
        return prepare_images(finished, limits, root.absolute(), path, tell, held, try_size)


def _some(
    rows: datasets.Dataset,
    source: Source,
    data: DataSection,
    draw: Draw | None,
    progress: Callable[[str], None],
    limit: int | None = None,
) -> tuple[datasets.Dataset, dict[int, int]]:
    """The rows that are drawn, the first `limit` of them, and the number of each among all."""
    numbers: Sequence[int] = range(len(rows))
    if draw is not None:
        numbers = drawn(len(rows), source, data.seed, held_out=draw == HELD_OUT)
    if len(numbers) < len(rows):
        progress(f"{source.path}: {len(numbers)} of {len(rows)} rows are {draw}, drawn with data.seed {data.seed}")
    numbers = numbers[:limit]
    return rows if len(numbers) == len(rows) else rows.select(numbers), dict(enumerate(numbers))


@contextmanager
def _numbered(numbers: Mapping[int, int], progress: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Rows in messages and errors by their number in the whole data set; gives what tells a message."""
    try:
        yield lambda line: progress(with_row_numbers(line, numbers))
    except DataError as error:
        where = with_row_numbers(error.where or "", numbers)
        raise DataError(with_row_numbers(error.what, numbers), where=where, fix=error.fix) from error


def _columns(rows: datasets.Dataset, data: Source, where: str, place: str) -> tuple[datasets.Dataset, list[list[Any]]]:
    """Rows under our column names, with `prompt` as TRL takes it, and the images that each row's messages held; `where`
    names the data set in messages, `place` its section in the configuration."""
    for ours, theirs in data.columns.items():
        if head_of(theirs, rows.column_names) not in rows.column_names:
            raise _missing(theirs, rows, f"{place}.columns.{ours}")
    renamed = _renamed(rows, data.columns, where)
    taken = sorted(GIVEN_BY_TRL.intersection(renamed.column_names))
    if taken:
        fix = f"Give it another, for instance data.columns: {{my_{taken[0]}: {taken[0]}}}."
        raise ConfigError(f"the column {taken[0]} has a name that TRL uses itself", where=where, fix=fix)
    pictured = bool(image_columns(renamed.column_names))
    if data.prompt_format == "text" and (pictured or data.system_prompt is not None):
        kind = "pictures" if pictured else "data.system_prompt"
        raise ConfigError(f"text that is taken as it is has no place for {kind}", where=f"{place}.prompt_format")
    numbered = _prompts(rows, renamed, data, place)
    prompts = [shaped(prompt, data, f"{where}, row {row}", pictured=pictured) for row, prompt in numbered]
    lifted = [(prompt, []) if isinstance(prompt, str) else lift(prompt) for prompt in prompts]
    return with_prompts(renamed, [prompt for prompt, _ in lifted], where), [held for _, held in lifted]


def _renamed(rows: datasets.Dataset, columns: Mapping[str, str], where: str) -> datasets.Dataset:
    """Mapped columns under our names, beside all others; an unmapped column gives way to a mapped one of its name."""
    used = {*columns, *columns.values()}
    others = [name for name in rows.column_names if name not in used]
    parts = [rows.select_columns(others)] if others else []
    for ours, theirs in columns.items():
        if theirs in rows.column_names:
            column = rows.select_columns([theirs])
            parts.append(column if ours == theirs else column.rename_column(theirs, ours))
        else:
            parts.append(nested_column(rows, theirs, ours, where))
    return datasets.concatenate_datasets(parts, axis=1)


def _prompts(rows: datasets.Dataset, renamed: datasets.Dataset, data: Source, place: str) -> Iterator[tuple[int, Any]]:
    """Row number and prompt, as it stands in the data or as the template makes it from columns of either name."""
    if data.prompt_template is None:
        if "prompt" not in renamed.column_names:
            raise _missing("prompt", rows, f"{place}.columns.prompt")
        yield from enumerate(renamed["prompt"][:])
        return
    place += ".prompt_template"
    fields, render = compiled(data.prompt_template, place)
    values = {}
    for field in fields:
        source = renamed if field in renamed.column_names else rows
        if field not in source.column_names:
            raise _missing(field, rows, place)
        values[field] = source[field][:]
    for row in range(len(rows)):
        try:
            yield row, render({field: column[row] for field, column in values.items()})
        except NOT_FIT as error:
            raise ConfigError(f"does not fit row {row}: {error}", where=place) from error


def _missing(column: str, rows: datasets.Dataset, where: str) -> ConfigError:
    hint = nearest_hint(column, rows.column_names)
    turns = next((name for name in ("conversations", "messages") if name in rows.column_names), None)
    if column == "prompt" and turns:
        hint += f" Write columns: {{prompt: '{turns}.:-1'}}, which is all but the answer."
    elif column == "prompt":
        hint += f" Map one with {where}, or write data.prompt_template."
    return ConfigError(
        f"the data has no column {column}", where=where, fix=f"{hint} Columns: {', '.join(rows.column_names)}."
    )
