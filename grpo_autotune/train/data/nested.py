"""Columns inside columns, where files of other trainers keep a row's prompt and answer (verl, ShareGPT, LLaMA-Factory):
`reward_model.ground_truth` of a row's mapping, `messages.0.content` and `conversations.:-1` of its list.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa

from grpo_autotune.errors import DataError

INDEX = re.compile(r"-?\d+")
SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


def head_of(path: str, columns: Sequence[str]) -> str:
    """The column that a path of the `columns` section begins with: all of it, where the data has one of that name."""
    return path if path in columns else path.partition(".")[0]


def nested_column(rows: datasets.Dataset, path: str, name: str, where: str) -> datasets.Dataset:
    """The values at a path, as a data set of one column `name`; an empty value at its end stays one. DataError, which
    names the row (counted from 0) of the data set `where`, for one that lacks what the path goes through."""
    head, *steps = path.split(".")
    values = [_walked(value, steps, path, f"{where}, row {row}") for row, value in enumerate(rows[head][:])]
    try:
        return datasets.Dataset.from_dict({name: values})
    except pa.ArrowInvalid:  # values of several types
        return as_json(values, name)


def as_json(values: Sequence[Any], name: str) -> datasets.Dataset:
    """A data set of one column that holds values of any types."""
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return datasets.Dataset.from_dict({name: texts}, features=datasets.Features({name: datasets.Json()}))


def _walked(value: Any, steps: Sequence[str], path: str, row: str) -> Any:
    for step in steps:
        try:
            if part := SLICE.fullmatch(step):
                value = value[slice(*(None if end is None else int(end) for end in part.groups()))]
            else:
                value = value[int(step)] if isinstance(value, list) and INDEX.fullmatch(step) else value[step]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{path} is not there: {step} of {value!r}", where=row, fix="Correct data.columns or the row."
            ) from error
    return value
