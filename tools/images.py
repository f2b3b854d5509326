"""Pictures of the pages as PNG for README and docs: `python -m tools.images RUN`, a folder that `make demo` filled.

They are drawn from RUN/probe, RUN/search and RUN/train, in seconds and without torch, into `docs/img/`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import vl_convert
from PIL import Image

from grpo_autotune.render.page import Picture
from grpo_autotune.render.probe_page import probe_sections
from grpo_autotune.render.search_page import search_sections
from grpo_autotune.render.train_page import train_sections
from grpo_autotune.report.files import load_log, load_report
from grpo_autotune.search.folder import load_search

DOCS = Path(__file__).parents[1] / "docs"
IMAGES, DEMO = DOCS / "img", DOCS / "benchmarks" / "demo"
SHOWN = {
    "The median step by stage": "step",
    "The fastest, the median and the slowest step": "timeline",
    "Seconds per step": "race",
    "Held-out reward": "evaluations",
}
"""Title of a picture -> the name of its file."""


def pictures(run: Path) -> Iterator[Picture]:
    """All pictures of the pages; of those with the same title the last one counts."""
    pages = (
        train_sections(load_log(run / "train"), None),
        search_sections(load_search(run / "search")),
        probe_sections(load_report(run / "probe"), run / "probe"),
        probe_sections(load_report(DEMO), DEMO),  # the one that README prints
    )
    for sections in pages:
        yield from (block for section in sections for block in section.blocks if isinstance(block, Picture))


def main() -> None:
    """Draw them."""
    IMAGES.mkdir(exist_ok=True)
    for picture in pictures(Path(sys.argv[1])):
        if picture.title in SHOWN:
            spec = {**picture.spec, "config": {**picture.spec["config"], "background": "white"}}
            drawn = Image.open(BytesIO(vl_convert.vegalite_to_png(spec, scale=1.0))).convert("RGB")
            drawn.quantize(dither=Image.Dither.NONE).save(IMAGES / f"{SHOWN[picture.title]}.png", optimize=True)


if __name__ == "__main__":
    main()
