"""`grpo-autotune import LOG`: the report of another framework's log."""

import json
from pathlib import Path

from grpo_autotune.console import say, show
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import refusal_told, write_whole
from grpo_autotune.render.imported import render_log
from grpo_autotune.report.logged import read_log


@refusal_told()
def import_log(path: Path, *, out: Path | None = None, config: Path | None = None, as_json: bool = False) -> int:
    """Print the report of the log, or its JSON, and write it to `out`: a page where that ends in `.html`, else JSON;
    `config` is held against it. Returns the exit code; ConfigError for a file without steps or seconds."""
    if not path.is_file():
        raise ConfigError("a folder is no log" if path.exists() else "there is no such file", where=str(path))
    numbers = None
    if config is not None:
        from grpo_autotune.interop.importing import import_file

        numbers = import_file(config).finished().numbers
    report = read_log(path, numbers)
    text = json.dumps(report.model_dump(mode="json"), indent=2)
    show(text if as_json else render_log(report))
    if out is not None and out.suffix == ".html":
        from grpo_autotune.commands.page import save_page
        from grpo_autotune.render.imported import log_page

        say(f"Saved: {save_page(out, log_page(report))}")
    elif out is not None:
        write_whole(out, text + "\n")
        say(f"Saved: {out}")
    return 0
