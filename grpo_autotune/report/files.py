"""A run's files: `report.json`, written whole or not at all, and the log and answers of a training run, read back."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.records.imported import LogReport
from grpo_autotune.records.report import Report
from grpo_autotune.records.stored import read_stored

REPORT_FILE = "report.json"
LOG_FILE = "train_log.jsonl"
PAGE_FILE = "report.html"
UNDER_WAY = ("spans.jsonl", LOG_FILE, "study.journal")
"""Files of a run that has no report yet."""


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
    """Read a report back, from a run folder or the file itself; ConfigError where there is none, it is not JSON, or
    another version of the schema wrote it."""
    path = Path(source)
    path = path / REPORT_FILE if path.is_dir() else path
    if is_log_report(path):
        fix = "`grpo-autotune import LOG` prints one, `compare` holds it against others."
        raise ConfigError("this is the report of a log", where=str(path), fix=fix)
    begun = any((path.parent / name).exists() for name in UNDER_WAY)
    absent = "this run has no report yet: it is under way, or was killed" if begun else "there is no report here"
    words = {"absent": absent, "written_by": "The end of a run" if begun else "`grpo-autotune probe`"}
    return read_stored(path, Report, **words, again="Probe again.")


def is_log_report(path: Path) -> bool:
    """True for a file that `import LOG --out` wrote, of whatever version."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return LogReport.schema_name().rpartition("/")[0].encode() in file.read(100)


def load_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training run's `train_log.jsonl`, in the order of writing; a line that is torn says nothing.
    ConfigError where there is none, or it holds no line."""
    path, rows = folder / LOG_FILE, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            whole = isinstance(row, dict) and row.get("kind") in ("train", "eval") and isinstance(row.get("step"), int)
            rows += [row] if whole else []
    if not rows:
        what, fix = "there is no log of a training run here", "`grpo-autotune train` writes one."
        raise ConfigError(what, where=str(path), fix=fix)
    return rows


def load_samples(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` answers of the newest step whose completions TRL stored there, with prompts and rewards."""
    from pyarrow import parquet

    files = (folder / "checkpoints" / "completions").glob("completions_*.parquet")
    for path in sorted(files, key=lambda path: (len(path.name), path.name), reverse=True):
        with suppress(OSError, ValueError):  # torn
            rows = parquet.ParquetFile(path).read().slice(0, count).to_pylist()
            return [{key: _said(value) for key, value in row.items()} for row in rows]
    return []


def _said(value: Any) -> Any:
    """The text of messages, and of the parts of one; numbers to four places."""
    if isinstance(value, list):
        return " ".join(filter(None, map(_said, value)))
    plain = round(value, 4) if isinstance(value, float) else value
    return _said(value.get("content") or value.get("text")) if isinstance(value, dict) else plain
