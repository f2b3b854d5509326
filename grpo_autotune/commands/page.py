"""The page of a run folder, `report.html`, from what the folder holds."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.console import as_warning, is_first_rank, say
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.files import full_disk_told, refusal_told, write_whole
from grpo_autotune.probe.live import goes_on
from grpo_autotune.records.alerts import load_alerts
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.report.files import (
    LOG_FILE,
    PAGE_FILE,
    REPORT_FILE,
    load_log,
    load_report,
    load_samples,
    save_report,
)
from grpo_autotune.search.folder import SEARCH_FILE, load_search

if TYPE_CHECKING:
    from grpo_autotune.render.page import Section

REFRESH_S = 60
"""Seconds between two pages of a training that runs."""
NO_SAMPLES = (
    "This run stored no answers (a training with `grpo.log_completions: true` does); no run stores their images."
)


ADDRESSES = 68 << 30
"""Bytes of addresses that V8 reserves, which draws the pictures; it ends its process where it gets none."""


def can_draw() -> bool:
    """Return whether a limit on this process's addresses (`RLIMIT_AS`) leaves room to draw pictures."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit == resource.RLIM_INFINITY or limit - psutil.Process().memory_info().vms >= ADDRESSES


@refusal_told()
def page_of(source: Path, *, interactive: bool = False, running: bool = False, samples: int = 0) -> str:
    """The page of a probe, a search or a training run, from its folder or the JSON file of its report.

    It has tooltips and zoom where `interactive`, as many of the newest `samples` as the run stored, and is read again
    by a browser while the training is `running`. EnvironmentProblem where no picture can be drawn.
    """
    if not can_draw():
        what, fix = "the limit on addresses leaves no room to draw pictures", "Lift it: ulimit -v unlimited."
        raise EnvironmentProblem(what, where="RLIMIT_AS", fix=fix)
    from grpo_autotune.render.page import Lines, Section, Table, render_page
    from grpo_autotune.render.train_page import train_sections, train_title

    folder = source if source.is_dir() else source.parent
    if (folder / LOG_FILE).is_file():
        log, file, stored = load_log(folder), folder / "config.yaml", None
        ended = not running and not goes_on(folder) and (folder / REPORT_FILE).is_file()
        report = load_report(folder) if ended else None
        if report is None and file.is_file():
            stored = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), str(file))
        config, alerts = stored if isinstance(stored, dict) else None, load_alerts(folder)
        title, sections = train_title(log, report, running=running), train_sections(log, report, config, alerts)
    else:
        title, sections = _sections(load_run(source).data, folder)
    if samples:
        rows = load_samples(folder, samples)
        answers = Table(list(rows[0]), [list(row.values()) for row in rows]) if rows else Lines([NO_SAMPLES])
        sections.insert(-2, Section("samples", "Answers", [answers]))
    return render_page(title, sections, interactive=interactive, refresh_s=REFRESH_S if running else None)


def _sections(report: Report | SearchReport, folder: Path) -> tuple[str, list[Section]]:
    from grpo_autotune.render.probe_page import probe_sections, probe_title
    from grpo_autotune.render.search_page import search_sections, search_title

    if isinstance(report, Report):
        return probe_title(report), probe_sections(report, folder)
    return search_title(report), search_sections(report)


@refusal_told()
def write_page(
    source: Path, file: Path | None = None, *, interactive: bool = False, running: bool = False, samples: int = 0
) -> Path:
    """Write the page of a folder, as `report.html` in it unless `file` is given; returns its path."""
    path = file or (source if source.is_dir() else source.parent) / PAGE_FILE
    return save_page(
        path, page_of(source, interactive=interactive, running=running, samples=samples), durable=not running
    )


def save_page(path: Path, text: str, *, durable: bool = True) -> Path:
    """Write a page, whole or not at all; returns its path."""
    try:
        with full_disk_told(path.parent, "Make room there."):
            write_whole(path, text, durable=durable)
    except OSError as error:
        fix = "Name another file behind --html."
        raise ConfigError(f"the page cannot be written ({error.strerror})", where=str(path), fix=fix) from error
    return path


@as_warning("no page")
def keep_page(folder: Path, *, running: bool = False) -> None:
    """Write the page beside what was measured and saved already; where it cannot be, that is a warning."""
    if running and not can_draw():  # it is said at the end
        return
    if is_first_rank() and any((folder / name).is_file() for name in (LOG_FILE, REPORT_FILE, SEARCH_FILE)):
        path = write_page(folder, running=running)
        if not running:
            say(f"Page: {path}")


class PrintableReport:
    """A report that prints itself, and is a page in a notebook; `data` is the report of `folder`, `to_dict()` its
    JSON."""

    def __init__(self, data: Report | SearchReport, folder: Path) -> None:
        self.data, self.folder = data, folder

    def __str__(self) -> str:
        from grpo_autotune.render.search import render_search
        from grpo_autotune.render.terminal import render

        return render(self.data) if isinstance(self.data, Report) else render_search(self.data)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from grpo_autotune.render.page import render_cell

        return render_cell(*_sections(self.data, self.folder))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return self.data.model_dump(mode="json")

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, of a search `search.json`, and the page `report.html` into `folder`, which is created
        where it is missing."""
        if isinstance(self.data, Report):
            save_report(self.data, folder)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_whole(Path(folder) / SEARCH_FILE, self.data.model_dump_json(indent=2) + "\n")
        keep_page(Path(folder))


@refusal_told()
def load_run(source: str | Path) -> PrintableReport:
    """The report of the probe, search or training in a run folder, or of the JSON file itself; an error where there is
    none, it is damaged, or may not be read."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        return PrintableReport(load_search(path), folder)
    return PrintableReport(load_report(path), folder)
