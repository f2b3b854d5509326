"""Rungs that a training went down where memory ran out: `ladder.jsonl` in its folder, a JSON line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from grpo_autotune.records.alerts import Alert
from grpo_autotune.records.base import Frozen
from grpo_autotune.units import size

LADDER_FILE = "ladder.jsonl"


class Rung(Frozen):
    """One rung down."""

    knobs: dict[str, Any]  # key path -> value from here on; what follows from it (accumulation) is not named
    before: dict[str, Any]  # the values until then
    kind: Literal["exact", "learning"]
    anew: bool = False  # True where no checkpoint fits the values, and training begins again
    step: int  # optimizer step in which memory ran out; 0 before the first
    rank: int  # process in which it did
    why: str  # the error in one line
    held_bytes: int  # memory that the process held then, on its GPU where it trains on one
    limit_bytes: int  # memory that there is for it
    time: float  # Unix seconds

    @property
    def change(self) -> str:
        """The change in words."""
        changed = {key: value for key, value in self.knobs.items() if value != self.before[key]}
        return ", ".join(f"{key} {self.before[key]} -> {value}" for key, value in changed.items())

    def alert(self) -> Alert:
        """The rung as reports, pages and `watch` show it."""
        place = f"in step {self.step}" if self.step else "before the first step"
        goes_on = "training begins anew" if self.anew else "training goes on from the newest checkpoint"
        learns = "the same is learned" if self.kind == "exact" else "on_oom_allow lets it change what is learned"
        return Alert(
            monitor="out_of_memory",
            step=self.step,
            metric="memory",
            value=float(self.held_bytes),
            limit=float(self.limit_bytes),
            unit="bytes",
            text=f"memory ran out {place} with {size(self.held_bytes)} of {size(self.limit_bytes)} held: {self.why}",
            remedy=f"{goes_on} in a fresh process with {self.change} ({learns})",
            action="ladder",
            rank=self.rank,
            time=self.time,
        )


def load_rungs(folder: Path) -> list[Rung]:
    """The rungs of a run, in order; none where it took none."""
    path = folder / LADDER_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Rung.model_validate_json(line) for line in lines]
