"""How a trial ended, from what lies in its folder and how its process went: one classifier for all endings."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from grpo_autotune.records.trial import HEARTBEAT_FILE, LOG_FILE, OUTCOME_FILE, Status, TrialOutcome, TrialSpec
from grpo_autotune.trials.child.worker import CANNOT_WRITE_EXIT

OWN_FAULT = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Signals that a process brings upon itself."""

GRAVEST: tuple[Status, ...] = ("oom", "reward_failed", "invalid", "crashed", "ok")
"""Of the ranks' outcomes the first of these counts: when one fails, the others fail because of it."""


class Ending(NamedTuple):
    """An ending seen from outside; without a status the outcome file says it."""

    status: Status | None = None
    why: str | None = None


def ending_of_exit(code: int, out_of_memory: bool) -> Ending:
    """Of a process that ended without an outcome.

    Args:
        code: Exit code; negative, the signal that ended it.
        out_of_memory: Whether the kernel has killed for memory meanwhile.
    """
    if code < 0:
        signum = -code
        name = signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
        if signum == signal.SIGKILL and out_of_memory:
            return Ending("oom", "killed by the kernel: memory ran out")
        if signum in OWN_FAULT:
            return Ending("crashed", f"ended by {name}; see {LOG_FILE}")
        return Ending("killed", f"ended by {name}, which the search did not send")
    if code == CANNOT_WRITE_EXIT:
        return Ending("crashed", "its outcome could not be written (is the disk full?)")
    return Ending("crashed", f"ended with exit code {code} and without an outcome; see {LOG_FILE}")


def read_outcome(folder: Path, spec: TrialSpec, ending: Ending) -> TrialOutcome:
    """The outcome that the child wrote, those of its ranks made one; where the child was silent, what was seen."""
    if ending.status in ("timeout", "hang"):
        return TrialOutcome(number=spec.number, status=ending.status, why=ending.why)
    found = []
    for path in sorted(folder.glob("outcome*.json")):
        try:
            found.append(TrialOutcome.model_validate_json(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            ending = Ending("crashed", f"{path.name} cannot be read: {error.errors()[0]['msg']}")
    if not found or (ending.status is not None and all(outcome.status == "ok" for outcome in found)):
        return TrialOutcome(number=spec.number, status=ending.status or "crashed", why=ending.why)
    return _as_one(found)


def clear(folder: Path) -> None:
    """Take away what an earlier run of the trial left, so that nothing old is read as new."""
    for name in (OUTCOME_FILE, "outcome.rank*.json", HEARTBEAT_FILE, LOG_FILE, "turn", "spans*.jsonl"):
        for path in folder.glob(name):
            path.unlink()


def _as_one(found: Sequence[TrialOutcome]) -> TrialOutcome:
    """The gravest rank's status on the first rank's figures, with the most memory that any rank took."""
    gravest = min(found, key=lambda outcome: GRAVEST.index(outcome.status))
    worst = max(found, key=lambda outcome: (outcome.peak_bytes or 0) - (outcome.idle_bytes or 0))
    base = found[0] if gravest.status == "ok" else gravest
    return base.model_copy(update={"peak_bytes": worst.peak_bytes, "idle_bytes": worst.idle_bytes})
