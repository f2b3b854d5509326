"""`grpo-autotune serve` for real, and training against it: an adapter over files, two processes, a server that dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.rollout.colocate.unlock import unlock_vllm
from grpo_autotune.rollout.parts import part_of
from grpo_autotune.rollout.server.client import ServerSync
from grpo_autotune.rollout.sync.sync import facts
from tests.support.trainers import make_trainer
from tests.support.training import text_config, uneven
from tests.support.trials import MARK, marked, processes, wait_until_none
from tests_vllm.conftest import ENV_FOLDER

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 240.0
MODEL = "qwen3_vl"
EXACT = 1e-4
"""Nats, in float32."""

Served = Callable[[str], Path]
Rows = list[dict[str, Any]]


class Command:
    """`grpo-autotune serve` as a user starts it."""

    def __init__(self, model: Path, folder: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        vllm = {"mode": "server", "server_base_url": self.address, "max_model_len": 512}
        lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        config = text_config(model, folder, {"vllm": vllm}, use_vllm=True)
        self.config = folder / "grpo.yaml"
        self.config.write_text(yaml.safe_dump({**config.to_dict(), "peft": lora}), encoding="utf-8")
        self.said, self.log = folder / "said.txt", folder / "out" / "serve.log"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo_autotune", "serve", self.config, "--out", folder / "out", *words],
                cwd=ROOT, env=environment(), stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> Command:
        deadline = time.monotonic() + START_LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.text()}\n{self.log.read_text()[-2000:] if self.log.exists() else ''}")
            time.sleep(0.2)
        return self

    def end(self, signum: int) -> int:
        self.process.send_signal(signum)
        return self.process.wait(timeout=60)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ENV_FOLDER}"}


@pytest.fixture(scope="module")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A server that answers, for a vision model; the last test ends it."""
    command = Command(served(MODEL), tmp_path_factory.mktemp("server"))
    try:
        yield command.until(lambda: "the server answers" in command.text())
    finally:
        command.process.kill()
        command.process.wait()


def trainer_of(served: Served, rows: Rows, out: Path, server: Command, **settings: Any) -> Any:
    mode = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.address}
    with unlock_vllm(weight_sync=settings.pop("weight_sync", "auto")):
        return make_trainer(served(MODEL), rows, out, rewards=[uneven], **{"learning_rate": 0.1, **mode, **settings})


def probed(trainer: Any) -> ProbeRecord:
    probe = Probe(trainer)
    trainer.train()
    probe.detach()
    return probe.record()


def adapters(server: Command) -> list[str]:
    models = httpx2.get(f"{server.address}/v1/models", timeout=10).json()["data"]
    return [model["id"] for model in models if model["parent"]]


def test_it_says_what_it_starts_and_how_to_train(server: Command) -> None:
    said = server.text()
    assert re.search(r"^VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 .*--max-model-len 512", said, re.M)
    assert f"vllm: {{mode: server, server_base_url: {server.address}}}" in said
    assert "--enable-scale-out" in said and "--dtype float32" in said


@pytest.mark.parametrize("rows_of", ["text_rows", "picture_rows"])
def test_the_adapter_reaches_it_after_every_step(
    served: Served, tmp_path: Path, server: Command, rows_of: str, request: pytest.FixtureRequest
) -> None:
    rows: Rows = request.getfixturevalue(rows_of)
    trainer = trainer_of(served, rows, tmp_path, server)
    record = probed(trainer)
    assert record.fidelity is not None and record.fidelity.ok
    assert record.fidelity.max_nats < EXACT
    link = part_of(trainer.vllm_generation, ServerSync)
    assert link is not None and link.way == "adapter" and len(facts(trainer)) == 3
    whole = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert all(sync.seconds > 0 and 0 < sync.bytes < whole / 10 for sync in facts(trainer))
    assert adapters(server) == [link.client.model]  # the older ones are gone
    link.close()
    assert adapters(server) == []


def test_without_a_new_adapter_the_log_probs_part(
    served: Served, text_rows: Rows, tmp_path: Path, server: Command
) -> None:
    """What the test above would see if nothing reached the server."""
    trainer = trainer_of(served, text_rows, tmp_path, server)
    link = part_of(trainer.vllm_generation, ServerSync)
    assert link is not None
    first = link.send
    link.send = lambda tensors: None if link.syncs else first(tensors)  # type: ignore[method-assign]
    record = probed(trainer)
    assert record.fidelity is not None and record.fidelity.max_nats > 10 * EXACT
    link.close()


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ({"weight_sync": "merged"}, EnvironmentProblem, "^vllm.weight_sync: all weights go to a server over NCCL"),
        (
            {"lora": False},
            ConfigError,
            "^vllm.weight_sync: no adapter can be sent to the vLLM server: the model has no",
        ),
    ],
)
def test_what_cannot_be_sent_is_one_line_before_training(
    served: Served, text_rows: Rows, tmp_path: Path, server: Command, settings: Any, error: Any, line: str
) -> None:
    with pytest.raises(error, match=line) as caught:
        trainer_of(served, text_rows, tmp_path, server, **settings)
    assert "\n" not in str(caught.value)


def test_two_processes_train_against_it(server: Command, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "grpo_autotune", "train", str(server.config), "--out", str(tmp_path), "--set", "grpo.max_steps=2"]
    done = subprocess.run(
        [*launch, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained 2 steps" in done.stderr
    found = [yaml.safe_load(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    ratios = [line[key] for line in found for key in line if "sampling_logp_difference/max" in key]
    assert len(ratios) == 2 and all(ratio < EXACT for ratio in ratios)


def test_a_port_that_is_taken(server: Command, tmp_path: Path) -> None:
    words = ["serve", str(server.config), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_autotune", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "vllm.server_port: nothing can listen at 127.0.0.1" in done.stderr.splitlines()[-1]


def test_a_server_that_is_killed_ends_training_in_one_line(
    served: Served, text_rows: Rows, tmp_path: Path, server: Command
) -> None:
    trainer = trainer_of(served, text_rows, tmp_path, server)
    sent = part_of(trainer.vllm_generation, ServerSync)
    assert sent is not None
    send = sent.send

    def send_and_kill(tensors: Any) -> None:
        send(tensors)
        if len(sent.syncs) == 2:
            server.process.kill()  # the command: its guardian ends the server
            server.process.wait()
            wait_until_gone(server.address)

    sent.send = send_and_kill  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem, match=f"the vLLM server at {server.address} does not answer") as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and trainer.state.global_step == 1


def wait_until_gone(address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx2.get(f"{address}/health", timeout=5)
        except httpx2.HTTPError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlives the command")


def test_a_signal_ends_all_that_was_started(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with marked(monkeypatch) as mark:
        assert MARK in environment()
        command = Command(served("qwen3"), tmp_path)
        command.until(lambda: command.log.exists() and len(processes(mark)) >= 3)
        assert command.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert wait_until_none(mark) == []
    assert "SIGTERM: the server shuts down" in command.text()


def test_a_server_that_does_not_start_says_why(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with marked(monkeypatch) as mark:
        command = Command(served("qwen3"), tmp_path, "--set", "vllm.max_model_len=100000")
        assert command.process.wait(timeout=START_LIMIT_S) == 3
        assert wait_until_none(mark) == []
    line = command.text().splitlines()[-1]
    assert line.startswith(f"grpo-autotune: {command.log}: the server did not start (exit code 1).")
    assert "max_model_len (100000) is greater than" in line
