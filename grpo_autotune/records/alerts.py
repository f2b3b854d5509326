"""The alerts of a training's monitors, `alerts.jsonl`, the rungs that it went down where memory ran out,
`ladder.jsonl`, and the numbers in a line of its log."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from grpo_autotune.records.base import Frozen
from grpo_autotune.units import listing, plural

ALERTS_FILE = "alerts.jsonl"
Log = Sequence[Mapping[str, Any]]


class Alert(Frozen):
    """A monitor that fired."""

    monitor: str
    step: int  # the optimizer step, of a stall the one under way
    metric: str  # TRL's name of what was read
    value: float | None  # None where it is no finite number
    limit: float | None = None  # None where there is none
    baseline: float | None = None  # of this run, where the limit follows from it
    unit: str = ""
    text: str  # what was seen
    remedy: str  # what to do
    action: str = "tell"
    rank: int = 0
    time: float = 0.0  # Unix seconds
    run: str = ""  # folder of the run

    @property
    def name(self) -> str:
        return f"{self.monitor} at step {self.step}"

    def line(self) -> str:
        """The alert as one line."""
        return f"{self.name}: {self.text}. {self.remedy[:1].upper()}{self.remedy[1:]}"


def load_alerts(folder: Path) -> list[Alert]:
    """The alerts of a run; a line that is torn says nothing."""
    alerts, path = [], folder / ALERTS_FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            alerts.append(Alert.model_validate_json(line))
    return alerts


def outcome(monitors: int, alerts: Sequence[Alert]) -> str:
    """The number of monitors of a run, and of those that fired; that none did is no proof that all is well."""
    names = {alert.monitor: alert.name for alert in reversed(alerts)}
    fired = f": {listing([*reversed(names.values())])}" if names else ""
    return f"{plural(monitors, 'monitor')}, {len(names)} fired{fired}"


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a log line; None where it has none of that name."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


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
