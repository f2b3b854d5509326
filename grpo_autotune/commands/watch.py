"""`grpo-autotune watch`: the state of probes, searches and trainings while they run, from their files alone."""

import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from grpo_autotune.console import is_live, show
from grpo_autotune.errors import ConfigError, printable
from grpo_autotune.probe.live import LIVE_FILE, Live
from grpo_autotune.records.alerts import load_alerts
from grpo_autotune.records.probe import STAGE_WORDS
from grpo_autotune.render.search import headline
from grpo_autotune.render.search_live import PLAIN_EVERY_S, panel
from grpo_autotune.report.files import REPORT_FILE
from grpo_autotune.search.folder import SEARCH_FILE, SearchFolder, load_search
from grpo_autotune.trials.heartbeat import HeartbeatReader
from grpo_autotune.units import duration, seconds, size

SILENT_S = 60.0
"""Silence from which a run on another machine, whose processes nobody here can see, may be over."""
LEVELS = "▁▂▃▄▅▆▇█"
NAMES = {"reward": "reward", "kl": "KL", "eval_reward": "held-out reward"}
COLUMNS = {"now": "now", "pace": "own", "left": "Search", "logged": "best"}
"""Fact of a training -> that of a search which stands in the same column of a table."""


class Run(NamedTuple):
    """A run: the state of its process in words, and what is known of it, each fact with its name."""

    folder: Path
    goes_on: bool
    state: str
    facts: list[tuple[str, str]]


def watch(folder: Path, every_s: float | None, *, once: bool) -> None:
    """Show the run in `folder`, or those below it in a table, until they are over; ConfigError where there is none."""
    live = is_live(sys.stdout) and "SLURM_JOB_ID" not in os.environ and not once
    with Screen(auto_refresh=False) if live else nullcontext() as screen:
        while True:
            runs = read_runs(folder)
            last = once or not any(run.goes_on for run in runs)
            if screen is not None:
                screen.update(_view(runs, folder), refresh=True)
            elif last:
                Console(width=None if sys.stdout.isatty() else 200, force_jupyter=False).print(_view(runs, folder))
            else:
                for run in runs:
                    show(printable(" | ".join([str(run.folder), run.state, *(text for _, text in run.facts)])))
            if last:
                return
            time.sleep(every_s or (1.0 if live else PLAIN_EVERY_S))


def _view(runs: list[Run], folder: Path) -> RenderableType:
    if len(runs) == 1:
        lines = [("run", f"{runs[0].folder}: {runs[0].state}"), *runs[0].facts]
        return Group(*(Text(f"{name:<8}{printable(text)}") for name, text in lines))
    table = Table("run", "state", *COLUMNS, box=None, pad_edge=False)
    for run in runs:
        facts = dict(run.facts)
        cells = (facts.get(name, facts.get(other, "")) for name, other in COLUMNS.items())
        table.add_row(*(Text(printable(cell)) for cell in (str(run.folder.relative_to(folder)), run.state, *cells)))
    return table


def read_runs(folder: Path) -> list[Run]:
    """The run in `folder`, or those up to two levels below it; a `ConfigError` where there is none."""
    for places in ([folder], [*folder.glob("*"), *folder.glob("*/*")]):
        runs = [run for place in sorted(places) if (run := _read(place)) is not None]
        if runs:
            return runs
    fix = "Name the folder of a probe, a search or a training, or one with such folders in it."
    raise ConfigError("there is no run here", where=str(folder), fix=fix)


def _read(folder: Path) -> Run | None:
    reported_s = _newest_s(folder / REPORT_FILE, folder / SEARCH_FILE)
    try:
        live = Live.model_validate_json((folder / LIVE_FILE).read_bytes())
    except (OSError, ValueError):  # a run of an older version, which may be over
        return Run(folder, False, "ended", []) if reported_s else None
    written_s = _newest_s(folder / LIVE_FILE)
    silent_s = time.time() - _newest_s(folder / LIVE_FILE, *folder.glob("trials/*/heartbeat"))
    lives, state = _lives(live, folder), "running"
    if live.over or (live.search and reported_s >= written_s):
        lives, state = False, f"stopped after step {live.step}" if live.step < live.of else "ended"
    elif lives is False:
        state = f"killed, or failed, {duration(silent_s)} ago"
    elif lives is None and silent_s > SILENT_S:
        state = f"no sign of life for {duration(silent_s)}: a slow file system, or killed"
    goes_on = lives is not False
    if live.search is None:
        alerts = [("alert", alert.line()) for alert in load_alerts(folder)[-3:]]
        return Run(folder, goes_on, state, [*_facts(live, goes_on), *alerts])
    if state == "ended":
        with suppress(ConfigError):
            return Run(folder, False, state, [("best", headline(load_search(folder))[1])])
    trial = HeartbeatReader(SearchFolder(folder).trial(live.search.trial.number))
    left_s = max(0.0, live.search.left_s - (time.time() - written_s - (0.0 if goes_on else silent_s)))
    now = live.search._replace(left_s=left_s, progress=trial.progress if trial.moved() else None)
    return Run(folder, goes_on, state, [(line[:8].strip(), line[8:]) for line in panel(now)])


def _newest_s(*files: Path) -> float:
    """Time of the newest of those files that are there and may be looked at, else 0."""
    times = [0.0]
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def _lives(live: Live, folder: Path) -> bool | None:
    """True where its process is there; None where that is on another machine, or somebody else's and not to be seen."""
    if live.host != socket.gethostname():
        return None
    with suppress(psutil.Error):
        process = psutil.Process(live.pid)
        return abs(process.create_time() - live.born_s) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    return None if os.getuid() not in (0, folder.stat().st_uid) else False


def _facts(live: Live, goes_on: bool) -> Iterator[tuple[str, str]]:
    stage = STAGE_WORDS.get(live.stage, live.stage) if live.stage != "other" else ""
    yield "now", ", ".join(filter(None, (f"step {live.step} of {live.of}" if live.step else "", stage)))
    if live.step_s:
        mean_s = statistics.fmean(live.step_s[1:] or live.step_s)  # the first may hold what comes but once
        low, high = min(live.step_s), max(live.step_s)
        marks = (LEVELS[round((s - low) / ((high - low) or 1.0) * (len(LEVELS) - 1))] for s in live.step_s)
        yield "pace", f"{seconds(mean_s)} per step {''.join(marks)}"
        if goes_on:
            yield "left", f"about {duration(mean_s * (live.of - live.step + 1))} left"
    if live.logged:
        yield "logged", ", ".join(f"{name} {live.logged[key]:.4f}" for key, name in NAMES.items() if key in live.logged)
    if live.memory_bytes:
        yield "memory", size(live.memory_bytes)
