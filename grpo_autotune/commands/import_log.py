"""`grpo-autotune import LOG`: the report of another framework's log."""

import json
from pathlib import Path

from grpo_autotune.console import say, show
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import refusal_told, write_whole
from grpo_autotune.render.logged import render_log
from grpo_autotune.report.logged import read_log


@refusal_told()
def import_log(
    path: Path, *, out: Path | None = None, html: Path | None = None, config: Path | None = None, as_json: bool = False
) -> int:
    """Print the report of the log, or its JSON; write the JSON to `out`, and the page to `html`. `config`, of any
    framework, is held against batch and GPUs of the log. Returns the exit code; ConfigError for a file without steps
    or seconds."""
    if not path.is_file():
        raise ConfigError("no such file" if not path.exists() else "a folder is no log", where=str(path))
    report = read_log(path, _batch(config) if config is not None else None)
    text = json.dumps(report.model_dump(mode="json"), indent=2)
    show(text if as_json else render_log(report))
    if out is not None:
        write_whole(out, text + "\n")
        say(f"Saved: {out}")
    if html is not None:
        from grpo_autotune.commands.page import save_page
        from grpo_autotune.render.logged import log_page

        say(f"Saved: {save_page(html, log_page(report))}")
    return 0


def _batch(config: Path) -> dict[str, float]:
    """The six numbers of a configuration."""
    from grpo_autotune.interop.importing import import_file

    return dict(import_file(config).finished().batch)
