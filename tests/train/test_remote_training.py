"""Real training against a server that goes wrong: it ends, resumes, and leaves nothing behind; two ranks agree."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.runs.checkpoints import survey
from tests.support.fault_server import TRANSIENT, FaultServer, at_rate
from tests.support.training import log_lines, text_config
from tests.train.test_trainer_ranks import torchrun

pytestmark = pytest.mark.slow


def service(url: str, **item: Any) -> dict[str, Any]:
    params = {"url": url, "body": {"value": "{{ completion | length }}"}, "timeout_s": 0.2}
    return {"name": "service", "params": params, "deadline_s": 5.0, **item}


@pytest.mark.long
@pytest.mark.parametrize("speedups", ["none", ["reward_overlap", "skip_dead"]])
def test_fifty_steps(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: Any, speedups: Any) -> None:
    from grpo_autotune.train.rewards.remote import batch
    from grpo_autotune.train.trainer import run_training

    quick = batch.Policy(wait_s=(0.001, 0.004), cooldown_s=0.05, open_s=0.05)
    monkeypatch.setattr(batch, "Policy", lambda: quick)
    rewards = [service("", weight=0.5), {"name": "tests.support.training:uneven"}]
    with FaultServer(at_rate(TRANSIENT, 0.2)) as server:
        rewards[0]["params"]["url"] = server.url
        config = text_config(tiny("qwen3"), tmp_path, {"rewards": rewards, "speedups": speedups}, max_steps=50)
        trainers: list[Any] = []
        threads = threading.active_count()
        run_training(config, tmp_path / "run", prepare=trainers.append)
        assert server.connections() == 0
    calls = trainers[0].reward_funcs[0].remote.calls()
    lines = [line for line in log_lines(tmp_path / "run") if line["kind"] == "train"]
    assert len(lines) == 50 and calls.rows == 400
    assert 0 < calls.retries <= 0.2 * calls.rows + 3
    assert sum(line["rewards/service/failed"] * 8 for line in lines) == sum(calls.failures.values()) > 0
    assert min(line["rewards/service/mean"] for line in lines if line["rewards/service/mean"] is not None) > 1
    assert threading.active_count() <= threads + 1  # TRL's own event loop


async def broken_on_one_rank(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Fails in its third batch on the second rank, so for half of each group where groups straddle ranks."""
    columns["log_metric"]("calls", 1.0)
    if os.environ.get("RANK") == "1" and columns["trainer_state"].global_step == 2:
        raise ConnectionError("no route")
    return [float(len(ids)) for ids in completion_ids]


def test_a_stop_on_one_rank_is_that_of_all(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # for the arithmetic of the batch; torchrun sets its own
    rewards = [
        {"name": "tests.train.test_remote_training:broken_on_one_rank", "on_failure": "stop"},
        {"name": "tests.support.training:uneven"},
    ]
    grpo = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 50}
    config = text_config(tiny("qwen3"), tmp_path, {"rewards": rewards}, **grpo)
    path, run = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(config.to_yaml(), encoding="utf-8")
    ended = torchrun(path, str(run), call=99, signum=signal.SIGTERM)
    assert ended.returncode != 0
    assert "reward broken_on_one_rank, step 3: 2 of 4 scores failed, and on_failure is stop" in ended.stderr
    assert [(one.step, one.flaw) for one in survey(run / "checkpoints")] == [(3, None)]
    shares = [line["rewards/broken_on_one_rank/failed"] for line in log_lines(run) if line["kind"] == "train"]
    assert shares == [0.0, 0.0, 0.5]
