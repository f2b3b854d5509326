"""What a call to an endpoint comes to: a reply, or one of three errors."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from grpo_autotune.errors import printable, shortened

REFUSED = (400, 401, 403, 404)
"""Statuses of a request that will never be answered: its key, name or form is wrong."""

SHOWN = 120
"""Characters of a server's own words in a message."""


@dataclass(frozen=True)
class Reply:
    """A score, and what it took: tokens sent and received, and their cost in the currency of the prices."""

    value: float
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None


@dataclass(frozen=True)
class Endpoint:
    """One server that scores rows.

    Attributes:
        name: How records, logs and messages call it.
        ask: Sends one row, once; raises `Refused`, `Busy` or `Failed`.
        rpm: Calls a minute that it allows, over all ranks; None where it names no limit.
        timeout_s: Longest one call may take, its answer read; the caller keeps it.
        where: Its key path inside the reward, such as `params.providers[1]`.
    """

    name: str
    ask: Callable[[Any], Awaitable[Reply]]
    rpm: int | None = None
    timeout_s: float = 60.0
    where: str = ""


class Refused(Exception):
    """The endpoint will not answer such a request, today or later (status 400, 401, 403, 404): the run stops.

    Args:
        status: Of the answer.
        said: The server's own words, without secrets.
    """

    def __init__(self, status: int, said: str = "") -> None:
        super().__init__(status, said)
        self.status, self.said = status, said


class Failed(Exception):
    """A call that may succeed if it is made again.

    Args:
        kind: A short word that is counted: `timeout`, `connect`, `read`, `503`, `json`, `schema`, `refusal`, `length`.
        said: The server's own words, without secrets.
        retry_after_s: The pause that it asks for.
    """

    def __init__(self, kind: str, said: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(kind, said)
        self.kind, self.said, self.retry_after_s = kind, said, retry_after_s


class Busy(Failed):
    """The endpoint asks for fewer calls (status 429), and for a pause of `retry_after_s` where it says so."""

    def __init__(self, retry_after_s: float | None = None) -> None:
        super().__init__("429", "", retry_after_s)


def check_status(status: int, headers: Mapping[str, str], text: str, secrets: Iterable[str] = ()) -> None:
    """Raise `Refused`, `Busy` or `Failed` for an answer that is not of the kind 2xx; `secrets` are cut out of it."""
    if 200 <= status < 300:
        return
    said = excerpt(text, secrets)
    if status in REFUSED:
        raise Refused(status, said)
    pause_s = retry_after(headers.get("retry-after"))
    if status == 429:
        raise Busy(pause_s)
    raise Failed(str(status), said, pause_s)


def excerpt(text: str, secrets: Iterable[str] = ()) -> str:
    """A server's words as one short line, without markup and without secrets."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return shortened(printable(re.sub(r"<[^>]*>", " ", text)), SHOWN)


def retry_after(value: str | None, now_s: Callable[[], float] = time.time) -> float | None:
    """Seconds that a `Retry-After` header asks for, given in seconds or as an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_s())
    except ValueError:
        return None
