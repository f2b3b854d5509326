"""`report.json` on disk: written whole or not at all, and read back with a clear word when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.folders import write_whole
from grpo_autotune.report.schema import SCHEMA, Report

REPORT_FILE = "report.json"


def save_report(report: Report, folder: str | Path) -> Path:
    """Write `report.json` into `folder`, which is created where it is missing; returns the file's path."""
    path = Path(folder) / REPORT_FILE
    write_whole(path, report.model_dump_json(indent=2) + "\n")
    return path


def load_report(source: str | Path) -> Report:
    """Read a report back.

    Args:
        source: A run folder, or the file itself.

    Raises:
        ConfigError: There is no report, it is not JSON, or another version of the schema wrote it.
    """
    path = Path(source)
    path = path / REPORT_FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError("there is no report here", where=str(path), fix="`grpo-autotune probe` writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ConfigError("this is not a JSON file", where=str(path)) from problem
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ConfigError(
            f"the report has the schema {found!r}, this version reads {SCHEMA!r}", where=str(path), fix="Probe again."
        )
    try:
        return Report.model_validate(data)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise ConfigError(
            f"the report is damaged at `{key}`: {first['msg']}", where=str(path), fix="Probe again."
        ) from problem
