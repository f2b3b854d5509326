"""The tables of speed-ups, from `docs/benchmarks/speedups*.json`: the README's, and those of 100 million parameters.

`python -m tools.readme_speedups` writes them; a test holds the pages against them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
CASES = {
    "768px": "image of 768 px, 64 new tokens",
    "448px": "image of 448 px, 64 new tokens",
    "768px-256": "image of 768 px, 256 new tokens",
    "text": "text, prompt of 1,000 tokens, 64 new",
    "short": "text, prompt of 20 tokens, G = 2",
    "long": "text, 1,024 new tokens",
}
COLUMNS = {
    "step": "step, plain over sped up",
    "log-probs and backward": "log-probs and backward, plain over sped up",
    "generation": "generation, plain over sped up",
    "memory of the training pass": "memory of the training pass, sped up over plain",
}


class Table(NamedTuple):
    """One table on a page.

    Attributes:
        page: The page.
        name: In the marks around it.
        benchmarks: Files whose ratios it holds.
        setting: What stands behind a case in a ratio's name.
    """

    page: str
    name: str
    benchmarks: tuple[str, ...]
    setting: str

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: python -m tools.readme_speedups -->\n"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->\n"

    def text(self) -> str:
        """The block between the marks, marks excluded."""
        ratios: dict[str, Any] = {}
        for name in self.benchmarks:
            ratios |= json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())["ratios"]
        lines = [f"| case (G = 8 where not said) | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
        for case, words in CASES.items():
            if f"{case}{self.setting}: all: {COLUMNS['step']}" in ratios:
                cells = [_cell(ratios[f"{case}{self.setting}: all: {name}"], name) for name in COLUMNS.values()]
                lines.append(f"| {words} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _cell(found: dict[str, float], name: str) -> str:
    if name.startswith("memory"):
        return f"{found['median']:.0%}"
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})"


LARGER = ("speedups_100m", "speedups_100m_text", "speedups_100m_256", "speedups_100m_small")
TABLES = (
    Table("README.md", "speed-ups", ("speedups",), ", checkpointing"),
    Table("docs/speedups.md", "100 million, checkpointing", LARGER, ", checkpointing"),
    Table("docs/speedups.md", "100 million, no checkpointing", ("speedups_100m_off", "speedups_100m_off_long"), ""),
)

if __name__ == "__main__":
    for table in TABLES:
        page = ROOT / table.page
        before, rest = page.read_text().split(table.begin)
        page.write_text(before + table.begin + table.text() + table.end + rest.split(table.end)[1])
