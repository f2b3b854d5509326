"""The outcomes of a call to an endpoint, a reply or an error, and the HTTP client that makes it."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from weakref import WeakKeyDictionary

import httpx2

from grpo_autotune.errors import ConfigError, printable, shortened

REFUSED = (400, 401, 403, 404)
"""Statuses of a request that will never be answered: its key, name or form is wrong."""

SHOWN, CONNECT_S, CLOSE_S = 120, 5.0, 5.0
"""Characters of a server's own words in a message; longest that connecting and closing may take."""

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, httpx2.AsyncClient]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Reply:
    """A score, and what it took: tokens, and their cost in the currency of the prices."""

    value: float
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None


@dataclass(frozen=True)
class Endpoint:
    """One server that scores rows."""

    name: str  # what records, logs and messages call it
    ask: Callable[[Any], Awaitable[Reply]]  # sends one row, once; raises `Refused`, `Busy` or `Failed`
    rpm: int | None = None  # calls per minute that it allows, over all ranks
    timeout_s: float = 60.0  # longest one call may take, its answer read; the caller keeps it
    where: str = ""  # key path inside the reward, such as `params.providers[1]`


class Refused(Exception):
    """The endpoint will not answer such a request, today or later: the run stops. `said` are its words."""

    def __init__(self, status: int, said: str = "") -> None:
        super().__init__(status, said)
        self.status, self.said = status, said


class Failed(Exception):
    """A call that may succeed if it is made again.

    Args:
        kind: A short word that is counted: `timeout`, `connect`, `read`, `503`, `json`, `schema`, `refusal`, `length`.
        said: The server's own words, without secrets.
        retry_after_s: The pause that it asks for."""

    def __init__(self, kind: str, said: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(kind, said)
        self.kind, self.said, self.retry_after_s = kind, said, retry_after_s or 0.0


class Unfit(Failed):
    """An answer that came and holds no score: it says nothing of other rows."""


class Busy(Failed):
    """The endpoint asks for fewer calls (status 429)."""

    def __init__(self, retry_after_s: float | None = None) -> None:
        super().__init__("429", "", retry_after_s)


def check_status(status: int, headers: Mapping[str, str], text: str, secrets: Iterable[str] = ()) -> None:
    """Raise `Refused`, `Busy` or `Failed` for an answer that is not of the kind 2xx; `secrets` are cut out of it."""
    if 200 <= status < 300:
        return
    if status in REFUSED:
        raise Refused(status, excerpt(text, secrets))
    pause_s = retry_after(headers.get("retry-after"))
    raise Busy(pause_s) if status == 429 else Failed(str(status), excerpt(text, secrets), pause_s)


def excerpt(text: str, secrets: Iterable[str] = ()) -> str:
    """A server's words as one short line, without markup and without secrets."""
    for secret_value in filter(None, secrets):
        text = text.replace(secret_value, "***")
    return shortened(printable(re.sub(r"<[^>]*>", " ", text)), SHOWN)


def retry_after(value: str | None, now_s: Callable[[], float] = time.time) -> float | None:
    """Seconds that a `Retry-After` header asks for, given in seconds or as an HTTP date (RFC 9110, 10.2.3)."""
    for read in (float, lambda text: parsedate_to_datetime(text).timestamp() - now_s()):
        with suppress(ValueError):
            return None if value is None else max(0.0, read(value))
    return None


def client() -> httpx2.AsyncClient:
    """The client of this process and the running loop, made anew after a fork and once it was closed.

    How long a call may take, and how many are made at once, is for the caller to limit."""
    loop, pid = asyncio.get_running_loop(), os.getpid()
    kept = _clients.get(loop)
    if kept is None or kept[0] != pid or kept[1].is_closed:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        kept = _clients[loop] = pid, httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=True)
    return kept[1]


async def aclose() -> None:
    """Close the client of the running loop and its connections; a later call makes another."""
    pid, kept = _clients.pop(asyncio.get_running_loop(), (0, None))
    if kept is not None and pid == os.getpid():
        await kept.aclose()


def close_in(loop: asyncio.AbstractEventLoop | None) -> None:
    """Close the client of a loop that runs on another thread."""
    if loop is not None and loop in _clients and loop.is_running():
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(aclose(), loop).result(CLOSE_S)


def failure(error: BaseException | None, secrets: Iterable[str] = ()) -> Failed:
    """An error of the client as one that is counted: `connect`, `timeout` or `read`; `secrets` are cut out of it."""
    kind = "timeout" if isinstance(error, httpx2.TimeoutException) else "read"
    kind = "connect" if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) else kind
    return Failed(kind, excerpt(str(error), secrets))


def secret(variable: str, where: str) -> str:
    """The value of an environment variable, to be read when it is sent and kept nowhere; ConfigError if it has none."""
    if value := os.environ.get(variable, "").strip():
        return value
    raise ConfigError(f"the environment variable {variable} is not set", where=where, fix="Export it before the run.")
