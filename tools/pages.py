"""The generated parts of the pages, each from the code or from committed figures: `make docs` writes them all.

A part stands between two marks that name it; two files are generated whole. Tests hold the pages to this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.render.terminal import render
from grpo_autotune.report.files import load_report
from tools import architecture, checks_table, config_reference, monitors_table
from tools.readme_speedups import table

ROOT = Path(__file__).parent.parent
LEFT_OUT = "[...]"


class Part(NamedTuple):
    """One generated part of a page; `name` stands in the marks around it."""

    page: str
    name: str
    text: Callable[[], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: make docs -->\n"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->\n"


def picture_of_a_probe() -> str:
    """The committed report of the demo as it is printed: its table, what bounds it, and the first learning advice."""
    sections = render(load_report(ROOT / "docs" / "benchmarks" / "demo")).rstrip().split("\n\n")
    end_of_table = next(index for index, section in enumerate(sections) if section.startswith(" one step"))
    shown = ["\n\n".join(sections[: end_of_table + 1])]
    shown += [section for section in sections if section.startswith("What bounds it")]
    shown += [section.split("\n 2. ")[0] for section in sections if section.startswith("What to change: alters")]
    return "\n".join(["```", f"\n{LEFT_OUT}\n".join(shown), "```", ""])


def branches_table() -> str:
    """KL of each branch at the end of each run of `docs/benchmarks/branches.json`."""
    rows = json.loads((ROOT / "docs" / "benchmarks" / "branches.json").read_text())["rows"]
    bands = {row["branch"]: row["band"] for row in rows}
    cells = {
        (name, control): f"{name}, with{'' if control else 'out'} control"
        for control in (True, False)
        for name in bands
    }
    lines = [f"| seed | {' | '.join(cells.values())} |", "|---" * (1 + len(cells)) + "|"]
    lines.append(f"| band | {' | '.join('in {:g} to {:g}'.format(*bands[name]) for name, _ in cells)} |")
    told = {(row["seed"], row["branch"], row["control"]): row for row in rows}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        ended = [told[seed, *cell] for cell in cells]
        kls = ["**{kl:.3f}**" if row["inside"] else "{kl:.3f}" for row in ended]
        lines.append(f"| {seed} | {' | '.join(form.format(**row) for form, row in zip(kls, ended, strict=True))} |")
    return "\n".join([*lines, ""])


def slurm_script(name: str) -> str:
    """A script of `examples/slurm` as a block."""
    return f"```sh\n{(ROOT / name).read_text()}```\n"


SLURM = [f"examples/slurm/{name}.sh" for name in ("train", "train_torchrun", "search", "server")]
SMALL = ("speedups",)
LARGER = ("speedups_100m", "speedups_100m_text", "speedups_100m_256", "speedups_100m_small")
LARGER_OFF = ("speedups_100m_off", "speedups_100m_off_long")

PARTS = (
    Part("README.md", "grpo-autotune report docs/benchmarks/demo", picture_of_a_probe),
    Part("README.md", "speed-ups", partial(table, SMALL, ", checkpointing")),
    Part("README.md", "rooms", architecture.room_map),
    Part("docs/commands.md", "checks", checks_table.table),
    Part("docs/speedups.md", "100 million, checkpointing", partial(table, LARGER, ", checkpointing")),
    Part("docs/speedups.md", "100 million, no checkpointing", partial(table, LARGER_OFF, "")),
    Part("docs/monitors.md", "monitors", monitors_table.rules),
    Part("docs/monitors.md", "monitors, measured", monitors_table.measured),
    Part("docs/branches.md", "branches", branches_table),
    *(Part("docs/scale.md", name, partial(slurm_script, name)) for name in SLURM),
    Part("docs/architecture.md", "files", architecture.file_tree),
    Part("docs/architecture.md", "seams", architecture.seam_table),
)
FILES: dict[str, Callable[[], str]] = {
    "docs/configuration.md": config_reference.markdown,
    "docs/rooms.svg": architecture.picture,
}


def with_parts(name: str, text: str) -> str:
    """The text of a page with its generated parts brought up to date.

    Raises:
        ValueError: A mark is missing, or is there twice.
    """
    for part in PARTS:
        if part.page == name:
            before, rest = text.split(part.begin)
            _, after = rest.split(part.end)
            text = before + part.begin + part.text() + part.end + after
    return text


if __name__ == "__main__":
    for name in dict.fromkeys(part.page for part in PARTS):
        page = ROOT / name
        page.write_text(with_parts(name, page.read_text()))
    for name, text in FILES.items():
        (ROOT / name).write_text(text())
