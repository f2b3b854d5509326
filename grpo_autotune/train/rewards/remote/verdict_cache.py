"""Verdicts that were given once, in a file of the cache folder that several processes and runs share."""

import os
import sqlite3
from functools import cache
from pathlib import Path

from grpo_autotune.console import warn
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import cache_dir


class VerdictCache:
    """Scores by key, in SQLite. A file that cannot be used is said once, and left alone from then on."""

    _is_usable = True

    def get(self, key: str) -> float | None:
        """The score of a key; None where there is none."""
        rows = self._execute("SELECT score FROM verdicts WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, score: float) -> None:
        """Keep a score."""
        self._execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", key, score)

    def _execute(self, statement: str, *values: str | float) -> list[tuple[float]]:
        if not self._is_usable:
            return []
        try:
            connection = _connection(cache_dir("judge") / "verdicts.sqlite", os.getpid())
            return connection.execute(statement, values).fetchall()
        except (sqlite3.Error, EnvironmentProblem) as error:
            self._is_usable = False
            warn(f"The judge's verdicts are not kept, their file cannot be used: {error}")
            return []


@cache
def _connection(path: Path, process: int) -> sqlite3.Connection:
    """The connection of a process, which waits up to 1 s for another's write; none survives a fork."""
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL)")
    return connection
