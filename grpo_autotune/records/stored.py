"""Reading a stored report: its schema's name is checked before its keys, and each failure says what to do."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.base import Document

Stored = TypeVar("Stored", bound=Document)


def read_stored(path: Path, kind: type[Stored], *, absent: str, written_by: str, again: str) -> Stored:
    """Read the record in a JSON file whose key `schema` must name that of its `kind`.

    Errors say `absent` where there is no file, `written_by` for the command that writes one, and `again` as the remedy
    for a file that cannot be used."""
    where, schema = str(path), kind.schema_name()
    if not path.is_file():
        raise ConfigError(absent, where=where, fix=f"{written_by} writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, allow_nan=False)  # `Infinity`, `NaN` and `1e999` are none of JSON's numbers
    except (ValueError, RecursionError) as problem:
        raise ConfigError("this is not a JSON file", where=where, fix=again) from problem
    name = data.get("schema") if isinstance(data, dict) else None
    if name != schema:
        raise ConfigError(f"the report has the schema {name!r}, this version reads {schema!r}", where=where, fix=again)
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"the report is damaged at `{key}`: {first['msg']}", where=where, fix=again) from problem
