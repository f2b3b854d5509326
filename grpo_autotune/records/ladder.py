"""Rungs that a training went down where memory ran out: `ladder.jsonl` in its folder, a JSON line each."""

from pathlib import Path
from typing import Any, Literal

from grpo_autotune.records.alerts import Alert

LADDER_FILE = "ladder.jsonl"


class Rung(Alert):
    """One rung down: the alert of memory that ran out, `value` of `limit` bytes held, in `step` (0: before the first),
    and what was changed."""

    monitor: str = "out_of_memory"
    metric: str = "memory"
    unit: str = "bytes"
    action: str = "ladder"
    knobs: dict[str, Any]  # key path -> value from here on; what follows from it (accumulation) is not named
    before: dict[str, Any]  # the values until then
    kind: Literal["exact", "learning"]

    @property
    def change(self) -> str:
        """The change in words."""
        changed = {key: value for key, value in self.knobs.items() if value != self.before[key]}
        return ", ".join(f"{key} {self.before[key]} -> {value}" for key, value in changed.items())

    def alert(self) -> Alert:
        """The alert alone, as reports, pages and `watch` show it."""
        return Alert.model_validate(self.model_dump(include=set(Alert.model_fields)))


def load_rungs(folder: Path) -> list[Rung]:
    """The rungs of a run, in order; none where it took none."""
    path = folder / LADDER_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Rung.model_validate_json(line) for line in lines]
