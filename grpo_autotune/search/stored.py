"""`search.json` read back, with a clear word when it cannot be."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.probe.stored import read_stored
from grpo_autotune.search.folder import SEARCH_FILE
from grpo_autotune.search.schema import SCHEMA, SearchReport


def load_search(source: Path) -> SearchReport:
    """Read a search's report from its folder, or from the file itself.

    Raises:
        ConfigError: There is none, it is not JSON, or another version of the schema wrote it.
    """
    path = source / SEARCH_FILE if source.is_dir() else source
    words = {"absent": "there is no search here", "written_by": "`grpo-autotune search`", "again": "Search again."}
    return read_stored(path, SearchReport, SCHEMA, **words)
