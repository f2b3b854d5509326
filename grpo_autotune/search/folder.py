"""Folder of a search: readable by hand, used by one process at a time, and enough to resume from after any kill.

config.yaml  machine.json  study.journal  state.json  races.jsonl  search.json
tuned.exact.yaml  tuned.yaml  tuned.fast.yaml
trials/0007/{spec.json, outcome.json, ...}
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import filelock
from pydantic import ValidationError

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.base import Frozen
from grpo_autotune.records.search import RaceRow, SearchReport
from grpo_autotune.records.stored import read_stored
from grpo_autotune.records.trial import OUTCOME_FILE, SPEC_FILE, TrialOutcome, TrialSpec
from grpo_autotune.units import hms

SEARCH_FILE = "search.json"
Record = TypeVar("Record", bound=Frozen)


class State(Frozen):
    """Progress of a search."""

    fingerprint: str  # of its configuration and space
    budget_s: float  # the one it was given last
    elapsed_s: float = 0.0  # seconds spent, over all processes
    finished: bool = False  # True where it came to its end


class SearchFolder:
    """Paths and files of a search."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.machine = path / "machine.json"
        self.journal = path / "study.journal"
        self.report = path / SEARCH_FILE
        self.state_file = path / "state.json"
        self.races_file = path / "races.jsonl"

    def tuned(self, which: str) -> Path:
        """`tuned.yaml`, or `tuned.exact.yaml` and `tuned.fast.yaml`."""
        return self.path / ("tuned.yaml" if which == "tuned" else f"tuned.{which}.yaml")

    def trial(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def trials(self) -> list[tuple[TrialSpec, TrialOutcome | None]]:
        """Every trial that was begun, by number; one that was killed with its parent has no outcome."""
        trials = []
        for folder in sorted((self.path / "trials").glob("[0-9]*")):
            spec = read_record(folder / SPEC_FILE, TrialSpec)
            if spec is not None:
                trials.append((spec, read_record(folder / OUTCOME_FILE, TrialOutcome)))
        return trials

    def keep_race(self, row: RaceRow) -> None:
        with self.races_file.open("a", encoding="utf-8") as file:
            file.write(f"\n{row.model_dump_json()}")  # behind a line that a kill or a full disk left half written

    def races(self) -> list[RaceRow]:
        """Races of an earlier start, the newest last; a line that was left half written says nothing."""
        rows = []
        for line in self.races_file.read_text(encoding="utf-8").splitlines() if self.races_file.exists() else ():
            with suppress(ValidationError):
                rows.append(RaceRow.model_validate_json(line))
        return rows

    def next_number(self) -> int:
        used = [int(folder.name) for folder in (self.path / "trials").glob("[0-9]*") if folder.name.isdecimal()]
        return max(used, default=-1) + 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other searches out of this folder meanwhile; ConfigError where one is in it, or it is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("this is a file, not a folder", where=str(self.path), fix="Give another --run-dir.")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = filelock.FileLock(self.path / ".lock").acquire(timeout=0)
        except filelock.Timeout as error:
            fix = "Give another --run-dir."
            raise ConfigError("another search is running in this folder", where=str(self.path), fix=fix) from error
        with lock:
            yield

    def check(self, fingerprint: str, *, without_speedups: str, resume: bool) -> State | None:
        """The state to resume from; None for a new search. `without_speedups` is the fingerprint of the same
        configuration without speed-ups, which are on where it leaves the key out. ConfigError where there is a search
        here and `resume` was not asked for, or it was for another configuration."""
        state = read_record(self.state_file, State)
        if state is None:
            if not resume and self.report.exists():
                raise ConfigError("this folder holds a search", where=str(self.path), fix="Give another --run-dir.")
            return None
        if not resume:
            raise ConfigError(
                "this folder holds a search that was "
                + ("finished" if state.finished else f"stopped after {hms(state.elapsed_s)}"),
                where=str(self.path),
                fix="Go on with --resume (a finished one with a larger --budget), or give another --run-dir.",
            )
        if state.fingerprint == without_speedups != fingerprint:
            fix = "Go on with --set speedups=none, or give another --run-dir."
            raise ConfigError("the search in this folder was begun without speed-ups", where=str(self.path), fix=fix)
        if state.fingerprint != fingerprint:
            what = "the search in this folder was begun with another configuration, or with other knobs"
            fix = "Give another --run-dir, or the configuration it was begun with."
            raise ConfigError(what, where=str(self.path), fix=fix)
        return state


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """A record, or None where it is missing or torn: a file that a full disk or a kill left half written."""
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def load_search(source: Path) -> SearchReport:
    """Read a search's report from its folder, or from the file itself; ConfigError where there is none, it is not JSON,
    or another version of the schema wrote it."""
    path = source / SEARCH_FILE if source.is_dir() else source
    texts = {"absent": "there is no search here", "written_by": "`grpo-autotune search`", "again": "Search again."}
    return read_stored(path, SearchReport, **texts)


def fingerprint(text: str) -> str:
    """Short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
