"""The README's table of speed-ups, from `docs/benchmarks/speedups.json`.

`python -m tests.readme_speedups` writes it; a test holds the README against it.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speed-ups: python -m tests.readme_speedups -->\n", "<!-- end of speed-ups -->\n"
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


def table() -> str:
    """The block between the marks, marks excluded: with gradient checkpointing, which is TRL's default."""
    ratios = json.loads((ROOT / "docs" / "benchmarks" / "speedups.json").read_text())["ratios"]
    lines = [f"| case (G = 8 where not said) | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for case, words in CASES.items():
        cells = []
        for column, name in COLUMNS.items():
            found = ratios[f"{case}, checkpointing: all: {name}"]
            if column.startswith("memory"):
                cells.append(f"{found['median']:.0%}")
            else:
                cells.append(f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END)[1])
