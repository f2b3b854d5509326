"""The page of a run folder, `report.html`, from what the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_autotune.console import as_warning, is_first_rank, say
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import full_disk_told, write_whole
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.render.page import Section, render_cell, render_page
from grpo_autotune.render.probe_page import probe_sections, probe_title
from grpo_autotune.render.search import render_search
from grpo_autotune.render.search_page import search_sections, search_title
from grpo_autotune.render.terminal import render
from grpo_autotune.report.files import LOG_FILE, PAGE_FILE, REPORT_FILE, load_log, load_report, save_report
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
    title, sections = _contents(source, running)
    return render_page(title, sections, interactive=interactive, refresh_s=REFRESH_S if running else None)


def _contents(source: Path, running: bool) -> tuple[str, list[Section]]:
    folder = source if source.is_dir() else source.parent
    if (folder / LOG_FILE).is_file():
        from grpo_autotune.render.train_page import train_sections, train_title

        log = load_log(folder)
        report = load_report(folder) if (folder / REPORT_FILE).is_file() and not running else None
        return train_title(log, report, running=running), train_sections(log, report)
    return _parts(load_run(source).data, folder)


def _parts(report: Report | SearchReport, folder: Path) -> tuple[str, list[Section]]:
    if isinstance(report, Report):
        return probe_title(report), probe_sections(report, folder)
    return search_title(report), search_sections(report)


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


class PrintableReport:
    """A report that prints itself, and is a page in a notebook; `data` is the report, `to_dict()` its JSON."""

    def __init__(self, data: Report | SearchReport, folder: Path) -> None:
        self.data, self._folder = data, folder

    def __str__(self) -> str:
        return render(self.data) if isinstance(self.data, Report) else render_search(self.data)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_cell(*_parts(self.data, self._folder))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return self.data.model_dump(mode="json")

    def save(self, folder: str | Path) -> None:
        """Write a probe's `report.json` and page `report.html` into `folder`, which is created where it is missing."""
        if isinstance(self.data, Report):
            save_report(self.data, folder)
            keep_page(Path(folder))


def load_run(source: str | Path) -> PrintableReport:
    """The report of the probe, search or training in a run folder, or of the JSON file itself.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        return PrintableReport(load_search(path), folder)
    return PrintableReport(load_report(path), folder)
