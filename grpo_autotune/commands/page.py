"""The page of a run folder, `report.html`, from what the folder holds."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.console import as_warning, is_first_rank, say
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.render.page import Section, render_page
from grpo_autotune.render.probe_page import probe_sections, probe_title
from grpo_autotune.report.files import LOG_FILE, PAGE_FILE, REPORT_FILE, load_log, load_report
from grpo_autotune.search.folder import SEARCH_FILE, load_search

REFRESH_S = 60
"""Seconds between two pages of a training that runs."""


def page_of(source: Path, *, interactive: bool = False, running: bool = False) -> str:
    """The page of a probe, a search or a training run.

    Args:
        source: Its folder, or the JSON file of its report.
        interactive: Tooltips and zoom, by scripts inside the page.
        running: The training goes on: a browser that shows the page reads it again now and then.

    Raises:
        ConfigError: There is nothing that a page can be made of, or it is damaged.
    """
    title, sections = contents(source, running)
    return render_page(title, sections, interactive=interactive, refresh_s=REFRESH_S if running else None)


def contents(source: Path, running: bool = False) -> tuple[str, list[Section]]:
    """Title and sections of the page, as for `page_of`."""
    folder = source if source.is_dir() else source.parent
    if (folder / LOG_FILE).is_file():
        from grpo_autotune.render.train_page import train_sections, train_title

        log = load_log(folder)
        report = load_report(folder) if (folder / REPORT_FILE).is_file() and not running else None
        return train_title(log, report, running=running), train_sections(log, report)
    if source.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        from grpo_autotune.render.search_page import search_sections, search_title

        searched = load_search(source)
        return search_title(searched), search_sections(searched)
    measured = load_report(source)
    return probe_title(measured), probe_sections(measured, folder)


def write_page(source: Path, file: Path | None = None, *, interactive: bool = False, running: bool = False) -> Path:
    """Write the page of a folder, as `report.html` in it unless `file` is given; returns its path.

    Raises:
        ConfigError: As for `page_of`, or the file cannot be written.
    """
    path = file or (source if source.is_dir() else source.parent) / PAGE_FILE
    text = page_of(source, interactive=interactive, running=running)
    try:
        with full_disk_told(path.parent, "Make room there."):
            write_whole(path, text, durable=not running)
    except OSError as error:
        fix = "Name another file behind --html."
        raise ConfigError(f"the page cannot be written ({error.strerror})", where=str(path), fix=fix) from error
    return path


@as_warning("no page")
def keep_page(folder: Path, *, running: bool = False) -> None:
    """Write the page beside what was measured and saved already; where it cannot be, that is a warning."""
    if is_first_rank():
        path = write_page(folder, running=running)
        if not running:
            say(f"Page: {path}")
