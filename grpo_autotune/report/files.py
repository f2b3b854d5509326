"""A run's files: `report.json`, written whole or not at all, and the log of a training run, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.records.report import SCHEMA, Report
from grpo_autotune.records.stored import read_stored

REPORT_FILE = "report.json"
LOG_FILE = "train_log.jsonl"
PAGE_FILE = "report.html"
WRITES_LOG = "`grpo-autotune train`"


def save_report(report: Report, folder: str | Path) -> Path:
    """Write `report.json` into `folder`, which is created where it is missing, and `trace.json.gz` of the spans there;
    returns the report's path."""
    from grpo_autotune.report.trace import keep_trace  # a stored report is printed without it

    path = Path(folder) / REPORT_FILE
    with full_disk_told(path.parent, "Make room there."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, report.model_dump_json(indent=2) + "\n")
    keep_trace(path.parent)
    return path


def clear(folder: Path) -> None:
    """Remove what an earlier run measured in `folder`, so that no trainer of it is left among those of the next."""
    for kind in (REPORT_FILE, PAGE_FILE, "live.json", "trace.json.gz", "spans.jsonl", "spans.rank*.jsonl"):
        for path in (*folder.glob(kind), *folder.glob(f"trainer-[0-9]*/{kind}")):
            path.unlink()


def load_report(source: str | Path) -> Report:
    """Read a report back, from a run folder or the file itself.

    Raises:
        ConfigError: There is no report, it is not JSON, or another version of the schema wrote it.
    """
    path = Path(source)
    path = path / REPORT_FILE if path.is_dir() else path
    words = {"absent": "there is no report here", "written_by": "`grpo-autotune probe`", "again": "Probe again."}
    return read_stored(path, Report, SCHEMA, **words)


def load_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training run's `train_log.jsonl`, in the order of writing; a line that is torn says nothing.

    Raises:
        ConfigError: There is none, or it holds no line.
    """
    path = folder / LOG_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = [row for line in lines if (row := _event(line)) is not None]
    if not rows:
        raise ConfigError("there is no log of a training run here", where=str(path), fix=f"{WRITES_LOG} writes one.")
    return rows


def _event(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and row.get("kind") in ("train", "eval") and isinstance(row.get("step"), int)
    return row if whole else None
