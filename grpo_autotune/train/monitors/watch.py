"""The state of the monitors: persistence and episodes over the lines of a log, and stages that do not end."""

import faulthandler
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_autotune.config.sections.monitors import MONITORS
from grpo_autotune.console import as_warning
from grpo_autotune.probe.stages import APART
from grpo_autotune.records.alerts import Alert
from grpo_autotune.train.monitors.rules import Reading, Row, Run
from grpo_autotune.units import duration, percent, plural

COOLDOWN = 50  # steps after an alert in which the same monitor tells no other episode of that metric
LATE_S = 30.0  # a look that comes so late tells of a process that was suspended

Place = tuple[int, object, str]  # steps done, a mark that each edge of a stage changes, and the stage


class Watch:
    """Monitors over a run; `see` takes the lines of its `train_log.jsonl`, as they are written or afterwards."""

    def __init__(self, items: Mapping[str, Any], run: Run) -> None:
        self.items, self.run = items, run
        self.told: dict[tuple[str, str], int] = {}  # step of the last alert of a metric by a monitor
        self.read: dict[tuple[str, str], int] = {}  # step of the last reading
        self._bad_steps: dict[tuple[str, str], int] = defaultdict(int)  # in a row
        self._open: set[tuple[str, str]] = set()  # episodes that were told

    def see(self, row: Row) -> list[Alert]:
        """The alerts of a line of the log."""
        rules = ((name, getattr(self.run, name)(row, item)) for name, item in self.items.items() if name != "stall")
        alerts = [alert for name, readings in rules for one in readings for alert in self.take(name, one, row["step"])]
        self.run.add(row)
        return alerts

    def take(self, name: str, reading: Reading, step: int) -> list[Alert]:
        """The alert of a monitor's reading, which stands for all steps since the last one, if it fires."""
        item, key = self.items[name], (name, reading.metric)
        steps = 1 if name == "held_out_gap" else step - self.read.get(key, self.run.step)
        bad_steps = self._bad_steps[key] = self._bad_steps[key] + steps if reading.bad else 0
        self.read[key] = step
        if not reading.bad:
            self._open.discard(key)
        waits, last = bad_steps < (1 if reading.at_once else item.steps), self.told.get(key, -COOLDOWN)
        if waits or key in self._open or 0 < step - last < COOLDOWN:
            return []
        self._open.add(key)
        self.told[key] = max(step, last)
        lasted = f", for {plural(bad_steps, 'evaluation' if name == 'held_out_gap' else 'step')}" * (bad_steps > 1)
        text = _said(reading, MONITORS[name][1]) + lasted
        return [alert_of(name, reading, step, text, action=item.action)] if step > last else []


def alert_of(name: str, reading: Reading, step: int, text: str, **more: Any) -> Alert:
    """The alert of a reading."""
    (_, unit, remedy), value = MONITORS[name], reading.value if math.isfinite(reading.value) else None
    known = {"metric": reading.metric, "value": value, "limit": reading.limit, "baseline": reading.baseline}
    more |= {"unit": unit, "text": text, "remedy": reading.remedy or remedy, "time": round(time.time(), 3)}
    return Alert(monitor=name, step=step, **known, **more)


def _said(reading: Reading, unit: str) -> str:
    figure = percent if unit == "share" else "{:.3g}".format
    value, limit, text = reading.value, reading.limit, reading.text
    if limit is not None and not text:
        base = "" if reading.baseline is None else f" (baseline {figure(reading.baseline)})"
        text = f"{'above' if value > limit else 'below'} {figure(limit)}{base}"
    unit = "" if unit in ("", "share") else f" {unit}"
    return f"{reading.metric} {figure(value)}{unit}, {text}" if math.isfinite(value) else text


class StallWatch:
    """The watch over a rank's stages by the limits of `item`: `tell` gets an alert of one that does not end, and the
    stacks of all threads are in `folder` by then."""

    def __init__(
        self, trainer: Any, item: Any, folder: Path, tell: Callable[[Alert], object], clock: Any = time.monotonic
    ) -> None:
        self._trainer, self._item, self._folder, self._tell, self._clock = trainer, item, folder, tell, clock
        self._waits: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=1000))
        self._place: Place | None = None
        self._since_s = self._looked_s = clock()
        self._is_told = False

    def look(self, place: Place | None) -> None:
        """Take the place that the training is at, None outside a step; every few seconds, from any thread."""
        now = self._clock()
        self._since_s += now - self._looked_s if now - self._looked_s > LATE_S else 0.0
        self._looked_s, waited_s = now, now - self._since_s
        if place != self._place:
            if self._place is not None:
                self._waits[self._place[2]].append(waited_s)
            self._place, self._since_s, self._is_told = place, now, False
        elif place is not None and self._item and not self._is_told and waited_s > (limit_s := self._limit_s(place)):
            self._is_told = True
            self._dump(place[2], waited_s, limit_s)

    def _limit_s(self, place: Place) -> float:
        waits = sorted(self._waits[place[2]]) or [0.0]
        least_s = self._item.first_s if place[0] == 0 or place[2] == APART else self._item.at_least_s
        return float(max(least_s, self._item.times * waits[len(waits) * 99 // 100]))

    def _dump(self, stage: str, waited_s: float, limit_s: float) -> None:
        rank, step = self._trainer.args.process_index, self._trainer.state.global_step + (stage != APART)
        path = self._folder / f"stacks-rank{rank}.txt"
        text = f"rank {rank} has been in {stage} for {duration(waited_s)}"
        with as_warning("the stacks were not written"), path.open("a", buffering=1, encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {text}:\n")
            faulthandler.dump_traceback(file)
        reading, text = Reading(stage, waited_s, True, limit_s), f"{text}; its threads' stacks are in {path.name}"
        self._tell(alert_of("stall", reading, step, text, rank=rank))
