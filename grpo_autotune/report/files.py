"""`report.json` on disk: written whole or not at all, read back, or one clear error."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.records.report import SCHEMA, Report
from grpo_autotune.records.stored import read_stored

REPORT_FILE = "report.json"


def save_report(report: Report, folder: str | Path) -> Path:
    """Write `report.json` into `folder`, which is created where it is missing; returns the file's path."""
    path = Path(folder) / REPORT_FILE
    with full_disk_told(path.parent, "Make room there."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, report.model_dump_json(indent=2) + "\n")
    return path


def clear(folder: Path) -> None:
    """Remove what an earlier run measured in `folder`, so that no trainer of it is left among those of the next."""
    for kind in (REPORT_FILE, "spans.jsonl", "spans.rank*.jsonl"):
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
