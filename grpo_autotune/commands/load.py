"""Reports that print themselves, and are pages in a notebook: of a stored run, or of a probe in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.report.files import REPORT_FILE, load_report, save_report
from grpo_autotune.search.folder import SEARCH_FILE, load_search


class PrintableReport:
    """A report that prints itself, and is a page in a notebook.

    `data` is the report of a probe, a training or a search, `to_dict()` what its file holds.
    """

    def __init__(self, data: Report | SearchReport, source: Path, *, stored: bool) -> None:
        self.data, self._source, self._stored = data, source, stored

    def __str__(self) -> str:
        from grpo_autotune.render.search import render_search
        from grpo_autotune.render.terminal import render

        return render(self.data) if isinstance(self.data, Report) else render_search(self.data)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from grpo_autotune.commands.page import contents
        from grpo_autotune.render.page import render_cell
        from grpo_autotune.render.probe_page import probe_sections, probe_title

        if isinstance(self.data, Report) and not self._stored:
            return render_cell(probe_title(self.data), probe_sections(self.data, self._source))
        return render_cell(*contents(self._source))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return self.data.model_dump(mode="json")

    def save(self, folder: str | Path) -> None:
        """Write a probe's `report.json` and page `report.html` into `folder`, which is created where it is missing."""
        from grpo_autotune.commands.page import keep_page

        if isinstance(self.data, Report):
            save_report(self.data, folder)
            keep_page(Path(folder))


def load_run(source: str | Path) -> PrintableReport:
    """The report of the probe, search or training in a run folder, or of the JSON file itself.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    path = Path(source)
    if path.name == SEARCH_FILE or ((path / SEARCH_FILE).is_file() and not (path / REPORT_FILE).is_file()):
        return PrintableReport(load_search(path), path, stored=True)
    return PrintableReport(load_report(path), path, stored=True)
