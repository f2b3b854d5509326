"""An HTTP server whose answers go wrong as a script says: for clients that must live with it."""

from __future__ import annotations

import json
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

LONGEST_S = 20.0
"""A hanging or dripping answer ends by itself after this, where the client does not leave before."""


@dataclass
class Call:
    """A request as the server saw it: times on `time.monotonic`; `end_s` is None while it is under way."""

    fault: str
    path: str
    headers: Mapping[str, str]
    body: Any
    begin_s: float = field(default_factory=time.monotonic)
    end_s: float | None = None


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: FaultServer
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        text = self.rfile.read(length)
        try:
            body = json.loads(text) if text else None
        except ValueError:
            body = text.decode()
        call = self.server.begin(self.path, dict(self.headers), body)
        try:
            if self.server.delay_s:
                time.sleep(self.server.delay_s)
            FAULTS[call.fault](self, json.dumps(self.server.answer(call)).encode())
        except OSError:
            self.close_connection = True
        finally:
            call.end_s = time.monotonic()

    do_GET = do_PUT = do_POST

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int = 0) -> None:
        """A whole answer; `length` is added to its Content-Length."""
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body) + length), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def wait_for_leave(self, seconds: float) -> bool:
        """True once the client has closed its side; False if it has not within `seconds`."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def log_message(self, *args: object) -> None:
        pass


def _hang(handler: Handler, body: bytes) -> None:
    handler.wait_for_leave(LONGEST_S)
    handler.close_connection = True


def _drip(handler: Handler, body: bytes) -> None:
    """A byte now and then, so that no wait for the next one is long."""
    handler.send(200, body[:1], length=10_000)
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < LONGEST_S and not handler.wait_for_leave(0.01):
        handler.wfile.write(b" ")
    handler.close_connection = True


def _reset(handler: Handler, body: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def _too_short(handler: Handler, body: bytes) -> None:
    handler.send(200, body, length=10)
    handler.close_connection = True


def _busy(retry_after: Callable[[float], str] | None) -> Fault:
    def answer(handler: Handler, body: bytes) -> None:
        headers = {} if retry_after is None else {"Retry-After": retry_after(handler.server.retry_after_s)}
        handler.send(429, b'{"error": "slow down"}', headers)

    return answer


Fault = Callable[[Handler, bytes], None]
FAULTS: dict[str, Fault] = {
    "ok": lambda handler, body: handler.send(200, body),
    "429": _busy(None),
    "429_seconds": _busy(lambda seconds: f"{seconds:g}"),
    "429_date": _busy(lambda seconds: formatdate(time.time() + seconds, usegmt=True)),
    "500": lambda handler, body: handler.send(500, b'{"error": "broken"}'),
    "503": lambda handler, body: handler.send(503, b""),
    "401": lambda handler, body: handler.send(401, f"no such key: {handler.headers['X-Key']}".encode()),
    "404": lambda handler, body: handler.send(404, b"<html><body><h1>Not Found</h1></body></html>"),
    "hang": _hang,
    "drip": _drip,
    "reset": _reset,
    "html": lambda handler, body: handler.send(200, b"<html><body>Welcome</body></html>"),
    "cut": lambda handler, body: handler.send(200, body[: len(body) // 2]),
    "empty": lambda handler, body: handler.send(200, b""),
    "schema": lambda handler, body: handler.send(200, b'{"verdict": "good"}'),
    "content_length": _too_short,
}
TRANSIENT = tuple(name for name in FAULTS if name not in ("ok", "401", "404"))
"""Faults after which the same call may succeed."""


class FaultServer(ThreadingHTTPServer):
    """The server; `with FaultServer(...) as server` serves on a thread, and nothing of it is left behind.

    Args:
        script: Name of the fault of the call with this number, counted from 0.
        answer: The JSON of a good answer.
        delay_s: Before each answer.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(
        self,
        script: Callable[[int], str] = lambda number: "ok",
        answer: Callable[[Call], Any] = lambda call: {"score": float(call.body["value"])},
        delay_s: float = 0.0,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.answer, self.delay_s, self.retry_after_s = script, answer, delay_s, 0.0
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    def begin(self, path: str, headers: Mapping[str, str], body: Any) -> Call:
        with self._lock:
            self.calls.append(Call(self.script(len(self.calls)), path, headers, body))
            return self.calls[-1]

    def handle_error(self, *args: object) -> None:
        pass

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def connections(self) -> int:
        """Sockets of this process that lead to the server."""
        sockets = psutil.Process().net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port == self.port for one in sockets)


def at_rate(faults: tuple[str, ...], share: float, seed: int = 0) -> Callable[[int], str]:
    """A script in which this share of the calls goes wrong, each fault as often; the first calls are good."""
    rng = random.Random(seed)
    return lambda number: rng.choice(faults) if number > 2 and rng.random() < share else "ok"
