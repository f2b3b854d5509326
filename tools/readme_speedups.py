"""Tables of speed-ups, from `docs/benchmarks/speedups*.json`; `make docs` puts them into the pages (`tools.pages`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
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


def table(benchmarks: Sequence[str], setting: str) -> str:
    """The ratios of some files as a table.

    Args:
        benchmarks: Names of the files.
        setting: What stands behind a case in the name of a ratio.
    """
    ratios: dict[str, Any] = {}
    for name in benchmarks:
        ratios |= json.loads((BENCHMARKS / f"{name}.json").read_text())["ratios"]
    lines = [f"| case (G = 8 where not said) | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for case, words in CASES.items():
        if f"{case}{setting}: all: {COLUMNS['step']}" in ratios:
            cells = [_cell(ratios[f"{case}{setting}: all: {name}"], name) for name in COLUMNS.values()]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(ratio: dict[str, float], name: str) -> str:
    if name.startswith("memory"):
        return f"{ratio['median']:.0%}"
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
