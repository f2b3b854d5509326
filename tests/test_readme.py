"""The README's picture of a report is what the committed report prints."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.render.terminal import render
from grpo_autotune.report import load_report

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- grpo-autotune report docs/benchmarks/demo -->\n```\n", "```\n<!-- end of report -->"


def test_the_picture_is_the_committed_reports():
    picture = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    printed = render(load_report(ROOT / "docs" / "benchmarks" / "demo"))
    shown = [part.rstrip() for part in picture.split("[...]\n")]
    assert len(shown) > 1 and all(part in printed for part in shown)
