"""The HTTP client of a process: one an event loop, made inside it, anew after a fork and once it was closed."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from weakref import WeakKeyDictionary

import httpx2

from grpo_autotune.errors import ConfigError
from grpo_autotune.train.rewards.remote.replies import Failed

CONNECT_S, CLOSE_S = 5.0, 5.0
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, httpx2.AsyncClient]] = WeakKeyDictionary()


def client() -> httpx2.AsyncClient:
    """The client of the running loop; how long a call may take, and how many at once, is for the caller to limit."""
    loop, pid = asyncio.get_running_loop(), os.getpid()
    kept = _clients.get(loop)
    if kept is None or kept[0] != pid or kept[1].is_closed:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        kept = pid, httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=True)
        _clients[loop] = kept
    return kept[1]


async def aclose() -> None:
    """Close the client of the running loop and its connections; a later call makes another."""
    pid, kept = _clients.pop(asyncio.get_running_loop(), (0, None))
    if kept is not None and pid == os.getpid():
        await kept.aclose()


def close_in(loop: asyncio.AbstractEventLoop) -> None:
    """Close the client of a loop that runs on another thread."""
    if loop in _clients and loop.is_running():
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(aclose(), loop).result(CLOSE_S)


def failure(error: BaseException | None) -> Failed:
    """An error of the transport as one that is counted: `connect`, `timeout` or `read`."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Failed("connect", str(error))
    return Failed("timeout" if isinstance(error, httpx2.TimeoutException) else "read", str(error))


def secret(variable: str, where: str) -> str:
    """The value of an environment variable, to be read when it is sent and kept nowhere; ConfigError if it has none."""
    if value := os.environ.get(variable):
        return value
    raise ConfigError(f"the environment variable {variable} is not set", where=where, fix="Export it before the run.")
