"""A vLLM server as a process: started behind a guardian, waited for, and ended with all that it started.

`OwnServer` is the one that a run starts for itself (`vllm.server_gpus`): it listens at a free port of this machine, and
the trainer is left the GPUs that it does not take.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.config import RunConfig
from grpo_autotune.engine.server_log import last_error, words
from grpo_autotune.engine.serving import HOST, VISIBLE, Serving, serving, split_gpus
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware import detect
from grpo_autotune.knobs.given import model_config
from grpo_autotune.knobs.rules import installed
from grpo_autotune.seams.compat import ensure_torchvision
from grpo_autotune.search.processes import PYTHON, Guarded, without_rank

LOOK_S = 0.5
ANSWER_S = 5.0


class VllmServer(Guarded):
    """A server, from its start on.

    Args:
        wanted: How to start it.
        log: Gets its output.

    Raises:
        EnvironmentProblem: vLLM is not installed.
    """

    def __init__(self, wanted: Serving, log: Path) -> None:
        need_vllm()
        self.wanted, self.log, self._begun = wanted, log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        super().__init__(wanted.words(PYTHON), log, {**without_rank(), **wanted.environment})

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._begun

    def until_healthy(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until it answers; `look` is called now and then, and may raise.

        Raises:
            EnvironmentProblem: It ended before.
        """
        answers = False
        while not answers:
            look()
            answers = self._answers()
            if (code := self.wait(0.0 if answers else LOOK_S)) is not None:  # another one may answer at its port
                raise self.ended("the server did not start", code)

    def ended(self, what: str, code: int) -> EnvironmentProblem:
        """That it ended, with the error that its log ends with."""
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return EnvironmentProblem(f"{what} ({how})", where=str(self.log), fix=words(last_error(self.log)))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.wanted.address}/health", timeout=ANSWER_S):
                return True
        except (urllib.error.URLError, OSError):
            return False


class OwnServer(VllmServer):
    """The server that `config` asks to be started.

    Args:
        config: A run with `vllm.server_gpus`.
        source: Where its weights are.
        gpus: Its GPUs.
        log: Gets its output.

    Attributes:
        key: Equal for runs that can generate with the same server.
        port: Where it listens.

    Raises:
        EnvironmentProblem: vLLM is not installed.
    """

    def __init__(self, config: RunConfig, source: str, gpus: Sequence[str], log: Path) -> None:
        self.key, self.port = server_key(config, source, gpus), free_port()
        super().__init__(serving_at(_at_port(config, self.port), source, gpus), log)


def weights_of(config: RunConfig, say: Callable[[str], None]) -> str:
    """Where the weights are that a server reads; only for a folder it is known without loading torch.

    Args:
        config: The run.
        say: Told what is built.

    Raises:
        ConfigError: There is no such model.
    """
    folder = Path(config.model.name_or_path or "").expanduser()
    if config.model.name_or_path and folder.is_dir():
        return str(folder)
    ensure_torchvision()
    from grpo_autotune.train.models import model_source

    return model_source(config, say)


def serving_at(config: RunConfig, source: str, gpus: Sequence[str]) -> Serving:
    """How to serve the weights at `source` on these GPUs.

    Raises:
        ConfigError: As `engine.serving.serving`.
    """
    at = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": source})})
    return serving(config, source, model_config(config) or model_config(at), gpus)


def server_key(config: RunConfig, source: str, gpus: Sequence[str]) -> str:
    """Equal for runs that can generate with the same server."""
    return serving_at(_at_port(config, 1), source, gpus).line()


def address_keys(port: int) -> dict[str, Any]:
    """The `GRPOConfig` keys by which TRL finds a server of the run's own."""
    return {"vllm_server_host": HOST, "vllm_server_port": port}


def leave_gpus(config: RunConfig) -> list[str]:
    """Let this process train on the GPUs that its server does not take, and answer those that it does.

    To be asked once in a process, before torch is imported: CUDA looks at the variable when it is first used.

    Raises:
        ConfigError: There are not so many GPUs.
    """
    if not config.use_vllm or config.vllm.server_gpus is None:
        return []
    serve, train = split_gpus(config, len(detect().gpus))
    if train:
        os.environ[VISIBLE] = ",".join(train)
    return serve


def need_vllm() -> None:
    """Refuse to serve without the package.

    Raises:
        EnvironmentProblem: It is not installed.
    """
    if not installed("vllm"):
        raise EnvironmentProblem(
            "serving needs the package vllm, which is not installed", where="serve", fix="Install the extra `vllm`."
        )


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def _at_port(config: RunConfig, port: int) -> RunConfig:
    return config.model_copy(update={"vllm": config.vllm.model_copy(update={"server_port": port})})
