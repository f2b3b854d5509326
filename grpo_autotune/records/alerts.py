"""The alerts of a training's monitors, `alerts.jsonl`, and the numbers in a line of its log."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
