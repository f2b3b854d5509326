"""Rows that are drawn: those held out, a part of a data set, and a mixture of several, each decided by a seed alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np

from grpo_autotune.config.sections.data import DataSection, Source
from grpo_autotune.errors import ConfigError, DataError
from grpo_autotune.seams.stored_images import IMAGE_COLUMNS, image_feature
from grpo_autotune.train.branches.rows import in_shares
from grpo_autotune.train.data.nested import as_json

NAME = "dataset"
"""Column of a mixture that holds the name of each row's data set."""


def drawn(count: int, source: Source, seed: int, *, held_out: bool) -> Sequence[int]:
    """Numbers of the rows to train on, or of those held out, in their order; the two have none in common. DataError
    where `split_ratio` leaves none to train on."""
    order = np.random.default_rng(seed).permutation(count)
    aside = 0 if source.split_ratio is None else max(1, round(count * source.split_ratio))
    if held_out and aside:
        return sorted(order[:aside].tolist())
    left = order[aside:]
    if not len(left):
        raise DataError(f"split_ratio {source.split_ratio} leaves none of {count} rows", where=source.path)
    if source.subsample is not None and not held_out:
        share = source.subsample * len(left) if source.subsample < 1 else source.subsample
        left = left[: max(1, round(share))]
    return range(count) if len(left) == count else sorted(left.tolist())


def mixed(parts: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The rows of several data sets one after the other, with the column `dataset`; what one lacks is None. A column
    whose types differ holds values of any type, and images are lists where one has lists. ConfigError where they do not
    go together."""
    for name, rows in parts.items():
        if NAME in rows.column_names:
            told = f"a mixture names each row's data set in the column {NAME}, which this one has"
            raise ConfigError(told, where=f"data.mix.{name}", fix=f"Rename it: columns: {{my_{NAME}: {NAME}}}.")
    kinds = defaultdict[str, set[str]](set)
    for key, feature in (column for rows in parts.values() for column in rows.features.items()):
        kinds[key] |= {str(feature)} - {str(datasets.Value("null"))}
    if len(kinds["prompt"]) > 1:
        raise ConfigError("some prompts are messages, and some text", where="data.mix", fix="Set one prompt_format.")
    unlike = [key for key, types in kinds.items() if len(types) > 1 and key not in IMAGE_COLUMNS]
    lists = set(IMAGE_COLUMNS) <= set(kinds)
    aligned = []
    for name, rows in parts.items():
        for key in set(unlike) & set(rows.column_names):
            rows = datasets.concatenate_datasets([rows.remove_columns(key), as_json(rows[key][:], key)], axis=1)
        if lists and IMAGE_COLUMNS[0] in rows.column_names:
            rows = _in_lists(rows)
        aligned.append(rows.add_column(NAME, [name] * len(rows)))
    return datasets.concatenate_datasets(aligned)


def in_proportion(data: DataSection, rows: datasets.Dataset, say: Callable[[str], None]) -> datasets.Dataset:
    """Rows of a mixture for one epoch, in a drawn order and in the proportions of the weights: each at least once,
    without weights each once."""
    names = rows[NAME][:]
    counts = Counter(names)
    weights = {name: part.weight or counts[name] for name, part in data.mix.items()}
    total = sum(weights.values())
    if any(part.weight for part in data.mix.values()):
        order = in_shares(names, {name: weight / total for name, weight in weights.items()}, data.seed)
    else:
        order = np.random.default_rng(data.seed).permutation(len(names)).tolist()
    taken = Counter(names[row] for row in order)
    told = (f"{taken[name]} of {name} ({counts[name]} rows)" for name in data.mix)
    say(f"an epoch of {data.path}: {', '.join(told)}")
    return rows.select(order)


def _in_lists(rows: datasets.Dataset) -> datasets.Dataset:
    """The column `image` as lists in the column `images`."""
    one, several = IMAGE_COLUMNS
    stored = rows.cast_column(one, image_feature(several=False, decode=False))[one][:]
    values = [[] if image is None else [image] for image in stored]
    return rows.remove_columns(one).add_column(several, values, feature=image_feature(several=True, decode=True))
