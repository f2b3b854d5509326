"""The classifier of endings: an exception, an engine's failure or an exit code becomes a status and one line.

A log is not searched for words: an exception goes by its type, and what vLLM raises by the function that raised it
(`rollout.failures`, which reads a server's log the same way). A library that ends the process raises nothing: there the
log's last lines are read for its own.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.errors import ConfigError, DataError, EnvironmentProblem, RewardError
from grpo_autotune.hardware.out_of_memory import (
    causes,
    ended_for_memory,
    is_device_failure,
    is_out_of_memory,
    missing_bytes,
)
from grpo_autotune.processes.guarded import exit_words
from grpo_autotune.records.trial import LOG_FILE, Status
from grpo_autotune.rollout.failures import EngineFailure, engine_failure
from grpo_autotune.trials.exit_codes import CANNOT_WRITE

LONGEST_WHY = 400
"""Characters of another library's message."""

BY_TYPE: tuple[tuple[type[BaseException], Status], ...] = (
    (RewardError, "reward_failed"),
    (ConfigError, "invalid"),
    (EnvironmentProblem, "invalid"),
    (DataError, "invalid"),
    (BaseException, "crashed"),
)
"""Type of an exception that is not about memory, and the status; the first that fits."""

ONE_LINE = (ConfigError, EnvironmentProblem, DataError, RewardError)
"""Errors whose message is whole without their type."""

DEVICE_FAILED = (
    "the GPU failed, and its process can do no more with it: {} (an earlier call may be the cause: "
    "CUDA_LAUNCH_BLOCKING=1 shows which)"
)

OWN_FAULT = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Signals that a process brings upon itself."""

BY_EXIT: tuple[tuple[Callable[[int, bool], bool], Status, str], ...] = (
    (lambda code, kills: code == -signal.SIGKILL and kills, "oom", "killed by the kernel: memory ran out"),
    (lambda code, _: code == CANNOT_WRITE, "crashed", "its outcome could not be written (is the disk full?)"),
    (lambda code, _: code >= 0, "crashed", f"ended with {{how}} and without an outcome; see {LOG_FILE}"),
    (lambda code, _: -code in OWN_FAULT, "crashed", f"ended by {{how}}; see {LOG_FILE}"),
    (lambda code, _: True, "killed", "ended by {how}, which the search did not send"),
)
"""Condition on the exit code and on kills for memory, status and line; the first that fits."""


class Ending(NamedTuple):
    """The ending of a trial that did not go well; the fields are those of `TrialOutcome`, `why` is one line."""

    status: Status
    why: str
    error_type: str | None = None
    overshoot_bytes: int | None = None


def ending_of_error(error: BaseException, available: Callable[[], int | None]) -> Ending:
    """Classify an exception that ended a trial: a failed device, memory, an engine's failure, then its own type. One
    that was raised from an error about memory counts as that error, and `available` gives the bytes that this process
    could still have, for errors that name only what was requested."""

    def room() -> int:
        """Bytes left; 0 where they cannot be read: a thread that does not start counts as want of memory then."""
        return available() or 0

    failed = next((cause for cause in causes(error) if is_device_failure(cause)), None)
    if failed is not None:
        return Ending("crashed", DEVICE_FAILED.format(_first_line(failed)), type(failed).__name__)
    memory = next((cause for cause in causes(error) if is_out_of_memory(cause, room)), None)
    if memory is not None:
        missing = missing_bytes(str(memory), available)
        return Ending("oom", one_line(memory), type(memory).__name__, missing)
    if (engine := engine_failure(error)) is not None:
        return ending_of_engine(engine)._replace(error_type=type(list(causes(error))[-1]).__name__)
    status = next(status for kind, status in BY_TYPE if isinstance(error, kind))
    return Ending(status, one_line(error), type(error).__name__)


def ending_of_engine(failure: EngineFailure) -> Ending:
    """Classify an engine that did not start, in the trial's process or as its server."""
    return Ending(failure.status, str(failure.error()), overshoot_bytes=failure.overshoot_bytes)


def ending_of_exit(code: int, memory_kills: bool, log: Path | None = None) -> Ending:
    """Classify the end of a process without an outcome by its exit code (negative: the signal that ended it), by
    whether the kernel has killed for memory since the trial began, and by its log: a library that ends its process for
    want of memory says so in its last line."""
    if (code > 0 or code == -signal.SIGABRT) and log is not None and ended_for_memory(log):
        return Ending("oom", f"ended itself, as memory ran out; see {LOG_FILE}")
    status, why = next((status, why) for applies, status, why in BY_EXIT if applies(code, memory_kills))
    return Ending(status, why.format(how=exit_words(code)))


def one_line(error: BaseException) -> str:
    """Type and message on one line, cut short; errors of this package are a line already."""
    text = " ".join(str(error).split())
    if isinstance(error, ONE_LINE):
        return text
    return f"{type(error).__name__}: {text[:LONGEST_WHY]}".removesuffix(": ")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:LONGEST_WHY]
