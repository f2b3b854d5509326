"""`search.json` read back, with a clear word when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from grpo_autotune.errors import ConfigError
from grpo_autotune.search.folder import SEARCH_FILE
from grpo_autotune.search.schema import SCHEMA, SearchReport


def load_search(source: Path) -> SearchReport:
    """Read a search's report from its folder, or from the file itself.

    Raises:
        ConfigError: There is none, it is not JSON, or another version of the schema wrote it.
    """
    path = source / SEARCH_FILE if source.is_dir() else source
    if not path.is_file():
        raise ConfigError("there is no search here", where=str(path), fix="`grpo-autotune search` writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ConfigError("this is not a JSON file", where=str(path)) from problem
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ConfigError(
            f"the report has the schema {found!r}, this version reads {SCHEMA!r}", where=str(path), fix="Search again."
        )
    try:
        return SearchReport.model_validate(data)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise ConfigError(
            f"the report is damaged at `{key}`: {first['msg']}", where=str(path), fix="Search again."
        ) from problem
