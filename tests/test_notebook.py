"""The tutorial's notebook, run as it stands: reports are pages, and progress is lines."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from grpo_autotune.commands.page import load_run
from grpo_autotune.demo import Recipe, demo_model_path

ROOT = Path(__file__).parents[1]
QUICK = Recipe(see_steps=6, say_steps=12, slip_steps=2, batch=8)
STORED = ROOT / "tests" / "stored"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_two_reports_on_one_notebook_share_no_id_and_leave_its_style_alone() -> None:
    pages = [load_run(STORED / name)._repr_html_() for name in ("report.json", "report.json")]
    ids = [name for page in pages for name in re.findall(r' id="([^"]*)"', page)]
    assert len(ids) == len(set(ids)) > 30
    for page in pages:
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)
        style = re.search(r"<style>\.grpo-autotune \{(.*?)</style>", page, re.DOTALL)
        assert style is not None and not re.search(r":root|\bbody\b", style[1]) and "<html" not in page
    assert 'fill="#0072B2"' in pages[0], "a colour is no id"


def test_a_text_that_looks_like_an_id_is_shown_as_it_is(tmp_path: Path) -> None:
    report = json.loads((ROOT / "docs" / "benchmarks" / "demo" / "report.json").read_text())
    report["startup"][0]["name"] = 'a phase id="x"'
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert '>a phase id="x"<' in load_run(tmp_path)._repr_html_()


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_runs_its_reports_are_pages_and_its_progress_is_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    quick = demo_model_path(QUICK, lambda share: None)
    monkeypatch.setattr("grpo_autotune.demo.built_once", lambda folder: nullcontext(False))
    quick.rename(demo_model_path())
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if output.output_type == "execute_result"]
    assert [data["text/html"].startswith('<div class="grpo-autotune">') for data in shown] == [True] * 3
    assert "per optimizer step (median of" in shown[0]["text/plain"] and "Predicted" in shown[1]["text/plain"]
    streams = "".join(output.text for output in outputs if output.output_type == "stream")
    plain = "".join(data["text/plain"] for data in shown)
    assert "step 3 of 3 (measured)" in streams and "\r" not in streams and "\x1b" not in streams + plain
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
