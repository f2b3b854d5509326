"""A vLLM server as a process: started behind a guardian, waited for, and ended with all that it started.

`OwnServer` is the one that a run starts for itself (`vllm.server_gpus`): it listens at a free port of this machine, and
the trainer is left the GPUs that it does not take.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.machine import installed
from grpo_autotune.hardware.nvml import BEFORE, ORDER, PCI, VISIBLE
from grpo_autotune.processes.fresh import free_port
from grpo_autotune.processes.guarded import PYTHON, Guarded, exit_words, without_rank
from grpo_autotune.rollout.server.command import HOST, Serving, serving, split_gpus
from grpo_autotune.rollout.server.log import last_error, words

LOOK_S = 0.5
ANSWER_S = 5.0


class Weights(NamedTuple):
    """The weights that a server serves."""

    source: str  # folder, or name of a hub repository
    config_json: Mapping[str, Any]  # the model's config.json; empty where nobody has it yet


class VllmServer(Guarded):
    """A server, from its start on; its output goes to `log`. EnvironmentProblem where vLLM is not installed."""

    def __init__(self, wanted: Serving, log: Path) -> None:
        need_vllm()
        self.wanted, self.log, self._begun = wanted, log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        super().__init__(wanted.words(PYTHON), log, {**without_rank(), **wanted.environment})

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._begun

    def until_healthy(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until it answers, EnvironmentProblem if it ends before; `look` is called now and then, and may raise."""
        answers = False
        while not answers:
            look()
            answers = self._answers()
            if (code := self.wait(0.0 if answers else LOOK_S)) is not None:  # another one may answer at its port
                raise self.ended("the server did not start", code)

    def ended(self, what: str, code: int) -> EnvironmentProblem:
        """The error of a server that ended, with the one that its log ends with."""
        return EnvironmentProblem(f"{what} ({exit_words(code)})", where=str(self.log), fix=words(last_error(self.log)))

    def _answers(self) -> bool:
        import httpx2

        from grpo_autotune.rollout.server.http import http_client

        try:
            return http_client().get(f"{self.wanted.address}/health", timeout=ANSWER_S).is_success
        except httpx2.HTTPError:
            return False


class OwnServer(VllmServer):
    """The server that a run with `vllm.server_gpus` starts; its `key` is equal for runs that can generate with it."""

    def __init__(self, config: RunConfig, weights: Weights, gpus: Sequence[str], log: Path) -> None:
        self.key, self.port = server_key(config, weights, gpus), free_port()
        super().__init__(serving_at(_at_port(config, self.port), weights, gpus), log)


def serving_at(config: RunConfig, weights: Weights, gpus: Sequence[str]) -> Serving:
    """The command that serves these weights on these GPUs; raises as `command.serving`."""
    return serving(config, weights.source, weights.config_json, gpus)


def server_key(config: RunConfig, weights: Weights, gpus: Sequence[str]) -> str:
    """Equal for runs that can generate with the same server."""
    return serving_at(_at_port(config, 1), weights, gpus).line()


def address_keys(port: int) -> dict[str, Any]:
    """The `GRPOConfig` keys by which TRL finds a server of the run's own."""
    return {"vllm_server_host": HOST, "vllm_server_port": port}


def leave_gpus(config: RunConfig) -> list[str]:
    """Let this process train on the GPUs that its server does not take, and answer those that it does; ConfigError
    where there are not so many. To be asked once in a process, before torch is imported: CUDA looks at the variable
    when it is first used."""
    if not config.use_vllm or config.vllm.server_gpus is None:
        return []
    serve, train = split_gpus(config, len(detect().gpus))
    if train:
        os.environ.setdefault(ORDER, PCI)
        os.environ |= {VISIBLE: ",".join(train), BEFORE: ",".join([*train, *serve])}
    return serve


def need_vllm() -> None:
    """EnvironmentProblem where the package vllm is not installed."""
    if not installed("vllm"):
        fix = "Install the extra `vllm`."
        raise EnvironmentProblem("serving needs the package vllm, which is not installed", where="serve", fix=fix)


def _at_port(config: RunConfig, port: int) -> RunConfig:
    return config.model_copy(update={"vllm": config.vllm.model_copy(update={"server_port": port})})
