"""The heartbeat of a trial: a file that the child rewrites at every span edge, and that the parent only looks at.

A beat carries a number that always grows, so that the parent compares contents on its own clock: a clock that
jumps or a file system with coarse times cannot make a running trial look dead.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from grpo_autotune.records.trial import HEARTBEAT_FILE, Progress

_WIDTH = 96
STARTING = "start-up"
COMPILING = "compiling"
ANSWER = "generation elsewhere"
SAVING = "saving"
UNHURRIED = ("reward", COMPILING, ANSWER, SAVING)
"""Stages that say nothing for as long as somebody else works: a judge, a compiler, a server, a disk. The trial's limit
ends them, and silence does not."""


class HeartbeatWriter:
    """The heartbeat file of a trial's folder as the child writes it; a silent one writes nothing, since other ranks
    than the first share the folder."""

    def __init__(self, folder: Path, silent: bool = False) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._handle = None if silent else os.open(folder / HEARTBEAT_FILE, flags, 0o644)
        self._number = 0
        self._stage = STARTING
        self.step = self.of = 0
        self.began = False

    def beat(self, stage: str) -> None:
        """Say that `stage` is under way; one system call."""
        self._stage = stage
        if self._handle is None:
            return
        self._number += 1
        line = f"{self._number}\t{int(self.began)}\t{self.step}\t{self.of}\t{stage}"
        os.pwrite(self._handle, line[: _WIDTH - 1].ljust(_WIDTH - 1).encode() + b"\n", 0)

    def starting(self, phase: str) -> None:
        self.beat(f"{STARTING}: {phase}")

    def begin(self) -> None:
        """Say that start-up is over: from here on a silence counts as a hang."""
        self.began = True
        self.beat("step")

    def again(self) -> None:
        """Say that what was under way still is."""
        self.beat(self._stage)

    @contextlib.contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Say that `stage` is under way inside, and then again what was."""
        before = self._stage
        self.beat(stage)
        try:
            yield
        finally:
            self.beat(before)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class HeartbeatReader:
    """The heartbeat file as the parent reads it: the newest beat."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HEARTBEAT_FILE
        self._last = b""
        self.began = False
        self.seen = False
        self.progress = Progress(STARTING, 0, 0)

    def moved(self) -> bool:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return False
        fields = content.decode(errors="replace").rstrip().split("\t")
        if content == self._last or len(fields) != 5:
            return False
        self._last, self.seen = content, True
        self.began = fields[1] == "1"
        self.progress = Progress(fields[4], int(fields[2]), int(fields[3]))
        return True
