"""A real judge: vLLM serves SmolLM2-135M-Instruct, which scores the completions of real runs by JSON schema."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.rollout.server.command import SERVER_MODULE
from tests.support.real_model import real_model
from tests.support.training import text_config

pytestmark = pytest.mark.long

START_LIMIT_S = 240.0
SUCCESS = re.compile(r"vllm:request_success_total\b")
KEY = "local-judge-4f1c"
PROMPT = (
    "How well does the text answer the question? Give a short reason and a score from 0 (not at all) to 10 (fully).\n"
)
SAMPLING = {"max_tokens": 96, "extra_body": {"repetition_penalty": 1.2}}
"""So small a model repeats itself without."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server, which wants a key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--max-model-len", "1024", "--dtype", "float32", "--enforce-eager", "--served-model-name", "smol"]
    words = [sys.executable, "-m", SERVER_MODULE, "--model", str(real_model()), "--port", str(port), *options]
    log = tmp_path_factory.mktemp("judge") / "log.txt"
    given = {"VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        child = subprocess.Popen(words, env=os.environ | given, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(f"http://127.0.0.1:{port}"):
            if child.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=5).is_success
    except httpx2.HTTPError:
        return False


def rewards(judge: str, **provider: Any) -> list[dict[str, Any]]:
    first = {"base_url": judge, "model": "smol", "api_key_env": "JUDGE_KEY", **SAMPLING, **provider}
    params = {
        "providers": [first],
        "prompt": f"{PROMPT}Question: {{{{ prompt }}}}\n{{{{ completion }}}}",
        "scale": [0, 10],
    }
    return [{"name": "judge", "params": params}]


@pytest.fixture
def run(served: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    return lambda rewards, **grpo: text_config(served("qwen3"), tmp_path, {"rewards": rewards}, **grpo)


def test_it_judges_real_runs(judge: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """The second run samples the same completions, whose verdicts are there already, but for those that failed."""
    config = run(rewards(judge), max_steps=2, gradient_accumulation_steps=1)
    (tmp_path / "run.yaml").write_text(json.dumps(config.to_dict()))
    means, calls = [], []
    for number in range(2):
        folder = tmp_path / f"out{number}"
        before = requests(judge)
        assert main(["train", str(tmp_path / "run.yaml"), "--out", str(folder)]) == 0
        calls.append(requests(judge) - before)
        lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "rewards/judge/mean" in line]
        means.append([step["rewards/judge/mean"] for step in steps])
        assert max(step["rewards/judge/failed"] for step in steps) <= 0.5, "now and then it does not come to an end"
    assert len(means[0]) == 2 and all(0 <= mean <= 10 for mean in means[0]) and max(means[0]) > 0
    assert calls[0] >= 7 and calls[1] < calls[0] / 2


def requests(judge: str) -> int:
    """Chat completions that the server has answered."""
    text = httpx2.get(f"{judge.removesuffix('/v1')}/metrics", timeout=10).text
    return round(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if SUCCESS.match(line)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "large"}, "large at .* answered 404: The model `large` does not exist"),
        ({"api_key_env": "HOME"}, "smol at .* answered 401: .*Unauthorized"),
    ],
)
def test_its_refusals_are_one_line(
    judge: str, run: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], words: str, capfd: Any
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(run(rewards(judge, **changes)).to_dict()))
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert re.search(words, capfd.readouterr().err.splitlines()[-1])
