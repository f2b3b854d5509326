"""The README's pictures and figures are what the committed files say."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.render.terminal import render
from grpo_autotune.report import load_report
from tests import readme_speedups

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- grpo-autotune report docs/benchmarks/demo -->\n```\n", "```\n<!-- end of report -->"


def test_the_picture_is_the_committed_reports():
    picture = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    printed = render(load_report(ROOT / "docs" / "benchmarks" / "demo"))
    shown = [part.rstrip() for part in picture.split("[...]\n")]
    assert len(shown) > 1 and all(part in printed for part in shown)


def test_the_table_of_speed_ups_is_the_committed_benchmarks():
    readme = (ROOT / "README.md").read_text()
    block = readme.split(readme_speedups.BEGIN)[1].split(readme_speedups.END)[0]
    assert block == readme_speedups.table()
