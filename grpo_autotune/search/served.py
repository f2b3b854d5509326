"""The server that trials generate with, where their configuration has the run start its own (`vllm.server_gpus`).

It stays for the next trial that can use it. Weights that were pushed into it are the last trial's, so only one that
adapters are sent to can be used again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_autotune.config import RunConfig
from grpo_autotune.engine.server_log import logged_failure
from grpo_autotune.errors import AutotuneError
from grpo_autotune.hardware import detect
from grpo_autotune.search.attempt import Stopwatch, Watch
from grpo_autotune.search.trial import Progress, TrialOutcome, TrialSpec
from grpo_autotune.search.vllm_server import OwnServer, server_key, weights_of

SERVER_LOG = "server.txt"


class TooSlow(Exception):
    """The server does not answer within its trial's limit."""


class KeptServer:
    """At most one server, and the trials it can serve.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._server: OwnServer | None = None

    def ready(self, spec: TrialSpec, folder: Path, watch: Watch) -> tuple[TrialSpec, float] | TrialOutcome:
        """See that the trial's server answers, and that no other one takes memory.

        Args:
            spec: The trial.
            folder: Its folder; a server that is started logs there.
            watch: Told that it starts.

        Returns:
            The trial with the server's address, and the seconds that its start took (0 for one that was there); or what
            came of the trial, where the server did not start.

        Raises:
            BaseException: What interrupts the wait, such as `KeyboardInterrupt`.
        """
        if not is_served(spec):
            self.end()
            return spec, 0.0
        stopwatch = Stopwatch(self._clock)
        try:
            config = RunConfig.from_dict(spec.config)
            source = weights_of(config, lambda line: None)
            started = not self._serves(config, source)
            if started:
                self.end()
                watch(Progress("start-up: server", 0, 0))
                self._server = OwnServer(config, source, folder / SERVER_LOG)
                self._server.until_healthy(lambda: _in_time(stopwatch, spec))
        except TooSlow:
            self.end()
            return TrialOutcome(number=spec.number, status="timeout", why=_late(spec), elapsed_s=stopwatch.look())
        except AutotuneError as error:
            failure = _failure(error, folder / SERVER_LOG)
            self.end()
            return TrialOutcome(number=spec.number, elapsed_s=stopwatch.look(), **failure)
        assert self._server is not None
        seconds = stopwatch.look() if started else 0.0
        given = {**spec.config, "vllm": {**spec.config["vllm"], "server_port": self._server.port}}
        return spec.model_copy(update={"config": given, "limit_s": max(1.0, spec.limit_s - seconds)}), seconds

    def end(self) -> None:
        """End the server, and wait until it is gone."""
        server, self._server = self._server, None
        if server is not None:
            server.end()

    def _serves(self, config: RunConfig, source: str) -> bool:
        server = self._server
        pushed = bool(detect().gpus) and config.vllm.weight_sync != "adapter"
        return server is not None and not pushed and server.poll() is None and server.key == server_key(config, source)


def is_served(spec: TrialSpec) -> bool:
    """Whether a trial's configuration asks for a server of its own."""
    section: dict[str, Any] = spec.config.get("vllm") or {}
    return spec.script is None and section.get("server_gpus") is not None


def _in_time(stopwatch: Stopwatch, spec: TrialSpec) -> None:
    if stopwatch.look() > spec.limit_s:
        raise TooSlow


def _late(spec: TrialSpec) -> str:
    return f"over its limit of {spec.limit_s:g} s, while its server started"


def _failure(error: AutotuneError, log: Path) -> dict[str, Any]:
    found = logged_failure(log) if log.exists() else None
    if found is None:
        return {"status": "invalid", "why": str(error), "error_type": type(error).__name__}
    lacking = (found.needed_bytes or 0) - (found.available_bytes or 0)
    return {"status": found.status, "why": str(found.error()), "overshoot_bytes": max(0, lacking) or None}
