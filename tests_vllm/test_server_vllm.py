"""The probe in vLLM's server mode: a real server over real HTTP, less the weight transfer, which needs NCCL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from trl.generation.vllm_client import VLLMClient

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.train.trainer import build_trainer
from tests.support.trainers import make_trainer
from tests.support.training import text_config
from tests_vllm.test_probe_vllm import probed, ran

START_LIMIT_S = 240.0


@pytest.fixture(scope="module")
def server(served: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server with the tiny Qwen3 in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = ["--model", str(served("qwen3")), "--dtype", "float32", "--max-model-len", "256"]
    transfer = ["--weight-transfer-config", '{"backend": "nccl"}']
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *model, *transfer]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as out:
        child = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", child, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(timeout=60)


def _wait_until_healthy(address: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            httpx2.get(f"{address}/health", timeout=5).raise_for_status()
            return
        except httpx2.HTTPError:
            time.sleep(1)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def server_trainer(served: Callable[[str], Path], rows: list[dict[str, Any]], out: Path, address: str) -> Any:
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": address}
    return make_trainer(served("qwen3"), rows, out, learning_rate=0.0, **settings)


def test_weight_transfer_needs_cuda(
    served: Callable[[str], Path], text_rows: list[dict[str, Any]], tmp_path: Path, server: str
) -> None:
    with pytest.raises(NotImplementedError, match="NCCL weight-transfer engine, which needs a CUDA device"):
        server_trainer(served, text_rows, tmp_path, server)


def test_server_mode_is_measured(
    served: Callable[[str], Path],
    text_rows: list[dict[str, Any]],
    tmp_path: Path,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a learning rate of zero the server's weights stay right although none are sent."""
    sent: list[int] = []

    def walk_only(client: VLLMClient, metadata: Any, named_params: Iterable[Any]) -> None:
        sent.append(sum(1 for _ in named_params))

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", walk_only)
    record, stages = probed(server_trainer(served, text_rows, tmp_path, server))
    assert len(sent) == 3 and sent[0] > 0
    for name in ("generation", "weight_sync", "policy_logprob", "backward"):
        assert ran(stages[name]) == [True, True], name
    assert record.fidelity is not None and record.fidelity.ok
    assert record.fidelity.max_nats < 1e-4
    assert record.fidelity.threshold_nats == 1e-3 and record.fidelity.text_nats is not None
    assert record.fidelity.text_nats < 1e-4 and record.fidelity.moved is None
    engine, tokens = record.engine, record.tokens
    assert engine is not None and tokens is not None and engine.source == "server"
    assert engine.generations == 2 == engine.syncs and engine.preemptions == 0
    assert engine.prompt_tokens == round(tokens.prompt_per_step * 2), "a server counts a prompt for each completion"
    assert engine.decode_tokens == round(tokens.completion_per_step * 2)
    assert engine.decode_tokens_per_s is not None and engine.kv_tokens is not None


def test_a_server_that_is_not_there_is_one_line(served: Callable[[str], Path], tmp_path: Path) -> None:
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
        vllm = {"mode": "server", "server_base_url": address, "server_timeout": 1.0}
        with pytest.raises(EnvironmentProblem, match=f"^grpo: .*{address}") as caught:
            build_trainer(text_config(served("qwen3"), tmp_path, {"vllm": vllm}, use_vllm=True))
    assert "\n" not in str(caught.value)
