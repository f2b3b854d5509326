"""The vLLM server that a run starts for itself (`vllm.server_gpus`), for as long as the command takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_autotune.commands.console import is_first_rank, say
from grpo_autotune.config import RunConfig
from grpo_autotune.probe.startup import Startup
from grpo_autotune.search.vllm_server import OwnServer, address_keys, need_vllm, weights_of

LOG = "serve.log"


@contextmanager
def own_server(config: RunConfig, gpus: Sequence[str], out_dir: Path, startup: Startup) -> Iterator[dict[str, Any]]:
    """The server of `config`, answering, where it asks for one; ended with the block. The first rank starts it.

    Args:
        config: The run.
        gpus: The server's (`leave_gpus`).
        out_dir: The server's log goes to `serve.log` there.
        startup: Gets the wait, as the phase `engine`.

    Returns:
        The `GRPOConfig` keys by which TRL finds it; none where there is none.

    Raises:
        ConfigError: There is no such model.
        EnvironmentProblem: vLLM is missing, or the server did not start.
    """
    if not config.use_vllm or config.vllm.server_gpus is None or not is_first_rank():
        yield {}
        return
    need_vllm()
    server = OwnServer(config, weights_of(config, say), gpus, out_dir / LOG)
    try:
        say(f"a vLLM server starts at port {server.port} (its log: {server.log})")
        with startup.phase("engine"):
            server.until_healthy()
        yield address_keys(server.port)
    finally:
        server.end()
