"""The vLLM server that a run starts for itself (`vllm.server_gpus`), for as long as the command takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.console import is_first_rank, say
from grpo_autotune.rollout.server.process import OwnServer, Weights, address_keys, need_vllm

LOG = "serve.log"


@contextmanager
def own_server(
    config: RunConfig,
    weights: Callable[[ModelSection], Weights],
    gpus: Sequence[str],
    out_dir: Path,
    phase: Callable[[str], AbstractContextManager[None]],
) -> Iterator[dict[str, Any]]:
    """The server of `config`, answering, where it asks for one; ended with the block. The first rank starts it.

    `weights` finds what it serves on its GPUs (`leave_gpus`), ConfigError where there is no such model; its log goes to
    `serve.log` in `out_dir`, and the wait is the start-up phase `engine`. The block gets the `GRPOConfig` keys by which
    TRL finds it; none where there is none. EnvironmentProblem where vLLM is missing, or the server did not start."""
    if not config.use_vllm or config.vllm.server_gpus is None or not is_first_rank():
        yield {}
        return
    need_vllm()
    server = OwnServer(config, weights(config.model), gpus, out_dir / LOG)
    try:
        say(f"a vLLM server starts at port {server.port} (its log: {server.log})")
        with phase("engine"):
            server.until_healthy()
        yield address_keys(server.port)
    finally:
        server.end()
