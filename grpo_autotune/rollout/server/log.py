"""The error that ended a server, read from the traceback at the end of its log: type, raising function and message.

A server is another process, so that there is no exception to look at; its traceback has the same facts as one.
"""

import re
from pathlib import Path
from typing import NamedTuple

from grpo_autotune.hardware.out_of_memory import ended_for_memory, is_memory_sign
from grpo_autotune.rollout.failures import EngineFailure, check_at, device_failure

RAISED = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (\S.*)$")
"""The last line of a traceback, behind whatever a logger puts in front of it."""

FRAME = re.compile(r'File "[^"]*?((?:\w+/)*\w+)\.py", line \d+, in (\w+)')

OF_PYDANTIC = "1 validation error for "
"""How pydantic begins; what is wrong stands in the next line."""
MOST_SAID = 400

SECOND_HAND = "Engine core initialization failed"
"""vLLM's message from the process that did not fail itself."""


class Logged(NamedTuple):
    """An error in a log."""

    name: str  # full name of its type
    text: str  # its message, a line of it
    # module and function of the innermost frame, the module perhaps behind folders above its package; None where the
    # log has no traceback
    raised_in: tuple[str, str] | None


def last_error(log: Path) -> Logged | None:
    """The error that a log ends with: the first-hand one, where a process tells of another's."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [(at, match) for at, line in enumerate(lines) if (match := RAISED.search(line))]
    first_hand = [(at, match) for at, match in errors if not match[2].startswith(SECOND_HAND)]
    if not first_hand:
        return None
    at, match = first_hand[-1]
    more = lines[at + 1 : at + 2] if match[2].startswith(OF_PYDANTIC) else []
    frame = next((frame for line in reversed(lines[:at]) if (frame := FRAME.search(line))), None)
    raised_in = None if frame is None else (frame[1].replace("/", "."), frame[2])
    return Logged(match[1], " ".join([match[2], *more]), raised_in)


def logged_failure(log: Path) -> EngineFailure | None:
    """The failure of a server that found no memory, as `rollout.failures` words it; None for any other error."""
    if ended_for_memory(log):
        return device_failure("a kernel of bitsandbytes found none")
    error = last_error(log)
    if error is None:
        return None
    if error.raised_in is not None and (read := check_at(*error.raised_in)) is not None:
        return read(error.text)
    return device_failure(error.text) if is_memory_sign([error.name], error.text) else None


def words(error: Logged | None) -> str:
    """The error as one line for a user."""
    return "Its log says why." if error is None else f"{error.name.rpartition('.')[2]}: {error.text}"[:MOST_SAID]
