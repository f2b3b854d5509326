"""A log told from a configuration by what is in the file."""

import re
from pathlib import Path

from grpo_autotune.interop.logs.lines import opened

MARKS = re.compile(
    r"timing_s[/\"]|profiling/Time taken|train_speed\((?:s/it|iter/s)\)|\"log_history\"|['\"]step_time['\"]|"
    r"\{'loss': |[\d.]+(?:s/it|it/s)[\],]|\bstep_time,|,step_time\b"
)
CONFIGURATIONS = (".yaml", ".yml", ".sh", ".bash", ".py", ".ipynb", ".toml")
LOOKED_AT = 64 << 20  # characters of a file that are looked through for a mark


def is_log(path: Path) -> bool:
    """True for a file with marks of a training's log, or named as one; False for one named as a configuration."""
    if path.suffix in CONFIGURATIONS:
        return False
    if path.suffix in (".log", ".jsonl", ".csv", ".tsv", ".out", ".gz"):
        return True
    with opened(path) as file:
        done, tail = 0, ""
        while done < LOOKED_AT and (chunk := file.read(1 << 20)):
            if MARKS.search(tail + chunk):
                return True
            done, tail = done + len(chunk), chunk[-64:]
    return False
