"""The server that trials generate with, where their configuration has the run start its own (`vllm.server_gpus`).

It stays for the next trial that can use it. Weights that were pushed into it are the last trial's, so only one that
adapters are sent to can be used again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError
from grpo_autotune.hardware import detect
from grpo_autotune.records.trial import SERVER_LOG, Progress, TrialOutcome, TrialSpec
from grpo_autotune.rollout.server.command import split_gpus
from grpo_autotune.rollout.server.log import logged_failure
from grpo_autotune.rollout.server.process import OwnServer, server_key
from grpo_autotune.trained.serving import served_weights
from grpo_autotune.trials.endings import Ending, ending_of_engine
from grpo_autotune.trials.parent.watch import Watch


class TooSlow(Exception):
    """The server does not answer within its trial's limit."""


class ServerPool:
    """At most one server, and the trials it can serve; the clock tells monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._server: OwnServer | None = None
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile a trial that needs none leaves the server alone: the next one may need it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def ready(self, spec: TrialSpec, folder: Path, watch: Watch) -> tuple[TrialSpec, float] | TrialOutcome:
        """See that the trial's server answers, and that no other one takes memory (but see `held`); one that is started
        logs in the trial's folder, and `watch` is called. Answers the trial with the server's address, and the seconds
        that its start took (0 for one that was there); or the outcome of the trial, where the server did not start.
        Raises what interrupts the wait, such as `KeyboardInterrupt`."""
        if not is_served(spec):
            if not (self._held and not detect().gpus):  # its trial may train on every GPU
                self.end()
            return spec, 0.0
        begun = self._clock()

        def in_time() -> None:
            if self._clock() - begun > spec.limit_s:
                raise TooSlow

        try:
            started = self._start(spec, folder, watch, in_time)
        except TooSlow:
            self.end()
            why = f"over its limit of {spec.limit_s:g} s, while its server started"
            return TrialOutcome(number=spec.number, status="timeout", why=why, elapsed_s=self._clock() - begun)
        except AutotuneError as error:
            ending = _logged_ending(folder / SERVER_LOG) or Ending("invalid", str(error))
            self.end()
            return TrialOutcome(number=spec.number, elapsed_s=self._clock() - begun, **ending._asdict())
        assert self._server is not None
        seconds = self._clock() - begun if started else 0.0
        given = {"server_port": self._server.port, "limit_s": max(1.0, spec.limit_s - seconds)}
        return spec.model_copy(update=given), seconds

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def ending(self) -> Ending | None:
        """The ending of a trial whose server ended under it; None while that runs, and where there is none."""
        server = self._server
        if server is None or (code := server.poll()) is None:
            return None
        crash = Ending("crashed", str(server.ended("the server ended under the trial", code)))
        return _logged_ending(server.log) or crash

    def end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end()

    def _start(self, spec: TrialSpec, folder: Path, watch: Watch, look: Callable[[], None]) -> bool:
        """Start a server, unless the one that there is will do; return whether it was started."""
        config, gpu_count = RunConfig.from_dict(spec.config), len(detect().gpus)
        weights, (gpus, _) = served_weights(config.model, lambda line: None), split_gpus(config, gpu_count)
        server, pushed = self._server, gpu_count > 0 and config.vllm.weight_sync != "adapter"
        if server is not None and self.alive and not pushed and server.key == server_key(config, weights, gpus):
            return False
        self.end()
        watch(Progress("start-up: server", 0, 0))
        self._server = OwnServer(config, weights, gpus, folder / SERVER_LOG)
        self._server.until_healthy(look)
        return True


def is_served(spec: TrialSpec) -> bool:
    """Return whether a trial's configuration asks for a server of its own."""
    section: dict[str, Any] = spec.config.get("vllm") or {}
    return spec.script is None and section.get("server_gpus") is not None


def _logged_ending(log: Path) -> Ending | None:
    """The ending by a server that found no memory, from its log; None for any other."""
    failure = logged_failure(log) if log.exists() else None
    return None if failure is None else ending_of_engine(failure)
