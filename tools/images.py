"""Pictures of the pages as PNG for README and docs: `python -m tools.images RUN`, with a folder that `make demo` filled.

They are drawn from RUN/probe, RUN/search and RUN/train, in seconds and without torch, into `docs/img/`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import vl_convert

from grpo_autotune.commands.page import contents
from grpo_autotune.render.page import Picture

IMAGES = Path(__file__).parents[1] / "docs" / "img"
SHOWN = {
    "probe": ("The median step by stage", "The fastest, the median and the slowest step", "Seconds of each step"),
    "search": ("How many times faster",),
    "train": ("Held-out reward",),
}
"""Page -> the titles of its pictures that are drawn; `step.png` and so on are named by `NAMES`."""
NAMES = ("step", "timeline", "steps", "contributions", "evaluations")


def pictures(run: Path) -> Iterator[Picture]:
    """The chosen pictures of the three pages, in the order of `NAMES`."""
    for page, titles in SHOWN.items():
        _, sections = contents(run / page, running=False)
        found = {block.title: block for section in sections for block in section.blocks if isinstance(block, Picture)}
        yield from (found[title] for title in titles)


def main() -> None:
    """Draw them."""
    IMAGES.mkdir(exist_ok=True)
    for name, picture in zip(NAMES, pictures(Path(sys.argv[1])), strict=True):
        spec = {**picture.spec, "config": {**picture.spec["config"], "background": "white"}}
        (IMAGES / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=1.0))


if __name__ == "__main__":
    main()
