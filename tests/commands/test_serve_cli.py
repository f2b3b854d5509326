"""`grpo-autotune serve` without vLLM: the command it would run, and the mistakes it sees before anything starts."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_autotune.commands import serve as serve_command
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.hardware import detect
from grpo_autotune.processes.guarded import without_rank
from grpo_autotune.rollout.server import process
from grpo_autotune.rollout.server.command import Serving, serving, split_gpus
from grpo_autotune.rollout.server.log import last_error, logged_failure, words
from tests.commands.test_cli import environment
from tests.support.nvml import Card, with_gpus

MODEL = {"dtype": "float32", "model_type": "qwen3"}


def config(vllm: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    values = {
        "model": {"name_or_path": "owner/name"},
        "data": {"path": "rows.jsonl"},
        "rewards": [{"name": "exact_match"}],
        "speedups": "none",
        "grpo": {"use_vllm": True},
        **sections,
    }
    return RunConfig.from_dict({**values, "vllm": vllm or {}})


def options(found: Serving) -> dict[str, str | bool]:
    """Options with a value, and flags."""
    read: dict[str, str | bool] = {}
    words = list(found.options)
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            read[word[2:]] = True if after.startswith("--") else after
    return read


def test_what_trl_needs_of_a_server() -> None:
    found = serving(config(), "owner/name", MODEL)
    assert found.environment == {"VLLM_SERVER_DEV_MODE": "1"}
    assert options(found) == {
        "host": "127.0.0.1",
        "port": "8000",
        "dtype": "float32",
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": "-1",
        "weight-transfer-config": '{"backend": "nccl"}',
    }
    assert "enable-scale-out" in options(serving(config(), "m", {**MODEL, "vision_config": {}}))
    assert "dtype" not in options(serving(config(), "m", {}))  # not known
    typed = config(model={"name_or_path": "owner/name", "dtype": "bfloat16"})
    assert options(serving(typed, "m", MODEL))["dtype"] == "bfloat16"


def test_engine_keys_are_its_options_and_the_trainers_are_not() -> None:
    own = {"max_model_len": 512, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}
    found = options(
        serving(config({**own, "mode": "server", "server_timeout": 5.0, "enable_sleep_mode": True}), "m", MODEL)
    )
    assert {name: found[name] for name in ("max-model-len", "tensor-parallel-size", "gpu-memory-utilization")} == {
        "max-model-len": "512",
        "tensor-parallel-size": "2",
        "gpu-memory-utilization": "0.9",
    }
    assert not {"mode", "server-timeout", "enable-sleep-mode"} & found.keys()


@pytest.mark.parametrize(("rank", "room"), [(2, "8"), (16, "16"), (17, "32")])
def test_adapters_have_room(rank: int, room: str) -> None:
    found = serving(config(peft={"r": rank}), "m", MODEL)
    assert found.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert options(found)["enable-lora"] is True and options(found)["max-lora-rank"] == room


def test_adapters_that_have_none() -> None:
    with pytest.raises(ConfigError, match=r"^peft.r: vLLM takes adapters up to rank 512"):
        serving(config(peft={"r": 1000}), "m", MODEL)
    with pytest.raises(ConfigError, match=r"^model.load_in_4bit: a vLLM server takes no weights"):
        serving(config(peft={"r": 8}, model={"name_or_path": "m", "load_in_4bit": True}), "m", MODEL)


def test_gpus_of_the_server() -> None:
    one, two = (serving(config(), "m", MODEL, gpus) for gpus in (["3"], ["0", "1"]))
    assert one.environment["CUDA_VISIBLE_DEVICES"] == "3" and "tensor-parallel-size" not in options(one)
    assert two.environment["CUDA_VISIBLE_DEVICES"] == "0,1" and options(two)["tensor-parallel-size"] == "2"
    written = serving(config({"tensor_parallel_size": 1}), "m", MODEL, ["0", "1"])
    assert options(written)["tensor-parallel-size"] == "1"


@pytest.mark.parametrize("url", ["https://here:8000", "http://here", "http://here:8000/v1", "here:8000"])
def test_an_address_that_nothing_can_listen_at(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^vllm.server_base_url: .* Give http://HOST:PORT"):
        serving(config({"mode": "server", "server_base_url": url}), "m", MODEL)


def test_the_address_is_the_one_that_the_trainer_asks() -> None:
    found = serving(config({"mode": "server", "server_base_url": "http://localhost:8123"}), "m", MODEL)
    assert (found.host, found.port, found.address) == ("localhost", 8123, "http://localhost:8123")
    anywhere = serving(config({"server_host": "0.0.0.0", "server_port": 9}), "m", MODEL)
    assert anywhere.address == "http://127.0.0.1:9"


def serve(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grpo_autotune", "serve", *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    values = config({"max_model_len": 256}, model={"name_or_path": "model"}, peft={"r": 2}).to_dict()
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.mark.slow
def test_a_dry_run_prints_the_command_alone(here: Path) -> None:
    done = serve(here, "--dry-run", "--set", "vllm.max_model_len=128")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
    assert words[2:5] == ["vllm", "serve", "model"] and words[words.index("--max-model-len") + 1] == "128"
    assert not (here / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--gpus", "9999"], 2, "--gpus: there is no GPU 9999"),
        (["--gpus", "0,x"], 2, "--gpus: '0,x' is not a list of GPUs"),
        (["--set", "model.name_or_path=./nowhere"], 2, "model.name_or_path: ./nowhere is not a folder with a model"),
        (["--set", "vllm.port=1"], 2, "vllm.port"),
    ],
)
def test_mistakes_are_one_line(here: Path, words: list[str], code: int, said: str) -> None:
    done = serve(here, "--dry-run", *words)
    assert done.returncode == code and done.stdout == ""
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_vllm_it_says_so(here: Path) -> None:
    done = serve(here)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("grpo-autotune: serve: serving needs the package vllm")


def test_gpus_are_numbered_as_this_process_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gpus(monkeypatch, *[Card(uuid=f"GPU-{index}") for index in range(4)], visible="3,2,GPU-1")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    here = config(model={"name_or_path": str(tmp_path)})
    assert serve_command.serve_config(here, out_dir=tmp_path, gpus=[0, 2], dry_run=True) == 0
    assert "CUDA_VISIBLE_DEVICES=3,GPU-1 CUDA_DEVICE_ORDER=PCI_BUS_ID " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^--gpus: there is no GPU 3: 3 can be seen here"):
        serve_command.serve_config(here, out_dir=tmp_path, gpus=[3], dry_run=True)


def test_what_a_server_takes_is_hidden_from_the_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, *[Card(uuid=f"GPU-{index}") for index in range(4)], visible="1,3,0")
    for name in ("CUDA_DEVICE_ORDER", "GRPO_AUTOTUNE_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    own = config({"server_gpus": 1})
    assert process.leave_gpus(own) == ["0"]
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1,3", "PCI_BUS_ID")
    assert len(detect().gpus) == 3, "a report of this run still knows the whole machine"
    assert split_gpus(own, 3) == (["0"], ["1", "3"])


def test_a_server_of_the_runs_own_takes_the_last_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    own = config({"server_gpus": 2})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert split_gpus(own, 4) == (["2", "3"], ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6, 7")
    assert split_gpus(own, 8) == (["6", "7"], ["4"])
    with pytest.raises(ConfigError, match="Set it to 0"):
        split_gpus(own, 0)
    for hidden in ("", "-1", "-1,0,1,2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(ConfigError, match="2 of the 0 GPUs"):
            split_gpus(own, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6, 7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 of the 3 GPUs here would serve, and 2 must be left .* Set it to 1, or"):
        split_gpus(own, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="a run on several machines cannot start a server"):
        split_gpus(own, 8)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    found = serving(own, "owner/name", MODEL, ["6", "7"])
    assert found.environment["CUDA_VISIBLE_DEVICES"] == "6,7" and options(found)["tensor-parallel-size"] == "2"
    assert "server-gpus" not in options(found)
    assert (options(found)["max-num-seqs"], options(found)["max-num-batched-tokens"]) == ("8", "4096")


def test_a_server_is_no_rank_of_the_run_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun's TORCHELASTIC_USE_AGENT_STORE it would wait for a store that nobody hosts."""
    launched = ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "ROLE_WORLD_SIZE")
    for name in launched:
        monkeypatch.setenv(name, "1")
    assert not set(launched) & without_rank().keys() and "PATH" in without_rank()


class Ended(Serving):
    """A server that ends at once, at an address where another one answers."""

    def words(self, python: Any) -> list[str]:
        return [*python, "-c", "raise SystemExit('ValueError: taken')"]


@pytest.mark.slow
def test_a_stranger_at_the_port_is_not_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "need_vllm", lambda: None)
    with socketserver.TCPServer(("127.0.0.1", 0), Healthy) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        server = process.VllmServer(
            Ended("m", (), {}, "127.0.0.1", stranger.server_address[1], ()), tmp_path / "serve.log"
        )
        try:
            while server.poll() is None:
                time.sleep(0.05)
            with pytest.raises(EnvironmentProblem, match=r"did not start .* ValueError: taken"):
                server.until_healthy()
        finally:
            server.end()
            stranger.shutdown()


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers that all is well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


LOG = """
(EngineCore pid=7) ERROR 11-22 01:00:00 [core.py:1]   File "/env/lib/python3.11/{file}", line 9, in {function}
(EngineCore pid=7) ERROR 11-22 01:00:00 [core.py:1]     raise it
(EngineCore pid=7) ERROR 11-22 01:00:00 [core.py:1] {error}
  File "/env/lib/python3.11/vllm/v1/engine/core_client.py", line 9, in launch
RuntimeError: Engine core initialization failed. See root cause above.
"""
KV_UTILS = ("vllm/v1/core/kv_cache_utils.py", "_check_enough_kv_cache_memory")
NO_ROOM = (
    "ValueError: To serve at least one request with the models's max seq len (100), (2.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (1.0 GiB). Based on this, the estimated maximum model length is 50."
)


@pytest.mark.parametrize(
    ("where", "error", "status", "said"),
    [
        (KV_UTILS, NO_ROOM, "oom", "vllm.max_model_len: one request of full length needs 2.00 GiB"),
        (("vllm/model.py", "load"), "torch.OutOfMemoryError: CUDA out of memory.", "oom", "the engine ran out of"),
        (("vllm/model.py", "load"), "RuntimeError: DefaultCPUAllocator: can't allocate", "oom", "ran out of memory"),
        (("vllm/model.py", "load"), "OSError: [Errno 12] Cannot allocate memory", "oom", "ran out of memory"),
        (("vllm/model.py", "load"), "RuntimeError: std::bad_alloc", "oom", "ran out of memory: std::bad_alloc"),
        (
            ("vllm/v1/worker/gpu_worker.py", "determine_available_memory"),
            "AssertionError: Error in memory profiling. Initial free memory 70.0 GiB, current free memory 75.0 GiB.",
            "crashed",
            "another process gave some back. Try again",
        ),
        (("vllm/model.py", "load"), "torch.AcceleratorError: CUDA error: out of memory", "oom", "ran out of memory"),
        (("vllm/model.py", "load"), "judge.OutOfMemoryError: CUDA out of memory.", None, "OutOfMemoryError: CUDA out"),
        (("vllm/model.py", "load"), NO_ROOM, None, "ValueError: To serve at least one request"),
        (("vllm/model.py", "load"), "OSError: no such model", None, "OSError: no such model"),
    ],
)
def test_a_log_tells_what_ended_a_server(
    tmp_path: Path, where: tuple[str, str], error: str, status: str | None, said: str
) -> None:
    log = tmp_path / "serve.log"
    log.write_text(LOG.format(file=where[0], function=where[1], error=error))
    failure = logged_failure(log)
    assert (failure and failure.status) == status
    assert said in (str(failure.error()) if failure else words(last_error(log)))
    log.write_text("nothing of the kind")
    assert logged_failure(log) is None and words(last_error(log)) == "Its log says why."


@pytest.mark.parametrize(
    "other", [{"mode": "colocate"}, {"server_base_url": "http://h:1"}, {"server_host": "h"}, {"server_port": 1}]
)
def test_a_run_has_one_server(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^vllm.server_gpus: the run starts a server of its own, and"):
        config({"server_gpus": 1, **other})
