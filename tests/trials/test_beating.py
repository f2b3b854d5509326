"""Silence that is no hang: judges, compilers, engines and servers, on a clock that the test turns."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_autotune.records.trial import Progress, TrialSpec
from grpo_autotune.search.trial_log import TrialLog
from grpo_autotune.speedups.generation.decoding import Decoder
from grpo_autotune.trials.child.beating import beating
from grpo_autotune.trials.child.collectives import collective_limit
from grpo_autotune.trials.heartbeat import HeartbeatReader, HeartbeatWriter
from grpo_autotune.trials.parent.watch import Attempt, AttemptEnd

LIVING = SimpleNamespace(poll=lambda: None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def writer(tmp_path: Path):
    heartbeat = HeartbeatWriter(tmp_path)
    heartbeat.begin()
    yield heartbeat
    heartbeat.close()


def silence(attempt: Attempt, clock: Clock, seconds: float) -> AttemptEnd | None:
    end = attempt.look()
    for _ in range(int(seconds // 5)):
        clock.now += 5.0
        end = end or attempt.look()
    return end


@pytest.mark.parametrize(("stage", "hangs"), [("reward", False), ("compiling", False), ("backward", True)])
def test_a_judge_of_130_seconds_is_no_hang(tmp_path: Path, writer: HeartbeatWriter, stage: str, hangs: bool) -> None:
    clock = Clock()
    attempt = Attempt(LIVING, TrialSpec(number=0, config={}, limit_s=400.0), tmp_path, clock, print)
    writer.beat(stage)
    end = silence(attempt, clock, 130)
    assert (end is not None and end.ending is not None and end.ending.status == "hang") == hangs
    if not hangs:
        end = silence(attempt, clock, 300)
        assert end is not None and end.ending is not None and end.ending.status == "timeout", "its limit ends it"


def trainer_of(model: torch.nn.Module, generation: Any = None) -> Any:
    return SimpleNamespace(
        model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model), vllm_generation=generation
    )


def test_engine_steps_and_server_answers_beat(tmp_path: Path, writer: HeartbeatWriter) -> None:
    reader, seen = HeartbeatReader(tmp_path), []

    def look() -> None:
        seen.append((reader.moved(), reader.progress.stage))

    engine, client = SimpleNamespace(step=look), SimpleNamespace(generate=look)
    generation = SimpleNamespace(llm=SimpleNamespace(llm_engine=engine), vllm_client=client)
    writer.beat("generation")
    look()
    with beating(trainer_of(torch.nn.Linear(1, 1), generation), writer):
        engine.step()
        engine.step()
        client.generate()
    look()
    assert seen == [
        (True, "generation"),
        (True, "generation"),
        (True, "generation"),
        (True, "generation elsewhere"),
        (True, "generation"),
    ]
    engine.step()
    assert seen[-1] == (False, "generation"), "its layers are gone"


def test_replays_of_a_captured_step_beat(tmp_path: Path, writer: HeartbeatWriter, tiny) -> None:
    reader, seen = HeartbeatReader(tmp_path), []

    def capture(step: Any) -> Any:
        return lambda: seen.append(reader.moved()), step()

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    decoder = Decoder(torch.zeros(2, dtype=torch.long), capture=capture)
    with beating(trainer_of(model), writer):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=6, eos_token_id=None, custom_generate=decoder)
    assert seen == [True] * 5


def test_compiling_is_told(tmp_path: Path, writer: HeartbeatWriter) -> None:
    reader, seen = HeartbeatReader(tmp_path), []

    def backend(graph: Any, inputs: Any) -> Any:
        reader.moved()
        seen.append(reader.progress)
        return graph.forward

    writer.beat("policy_logprob")

    def added(
        number: torch.Tensor,
    ) -> torch.Tensor:  # all modules of a process share one code, compiled 8 times at most
        return number + 1

    with beating(trainer_of(torch.nn.Linear(1, 1)), writer):
        torch.compile(added, backend=backend, fullgraph=True)(torch.ones(1, 1))
    reader.moved()
    assert seen == [Progress("compiling", 0, 0)] and reader.progress.stage == "policy_logprob"


@pytest.mark.parametrize(("processes", "hang_s"), [(1, 120.0), (2, 900.0)])
def test_ranks_that_wait_for_each_other_have_the_trials_limit(processes: int, hang_s: float) -> None:
    config = SimpleNamespace(to_dict=dict, batch=SimpleNamespace(processes=processes))
    task = SimpleNamespace(folder=SimpleNamespace(next_number=lambda: 1), script=None, places=())
    log = TrialLog(task, runner=None, budget=None, view=None)
    assert log.spec("timed", config, {}, 900.0).hang_s == hang_s


def test_collectives_end_before_the_trial_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    alone = TrialSpec(number=0, config={}, limit_s=300.0)
    assert collective_limit(alone) == {} and "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC" not in os.environ
    ranks = alone.model_copy(update={"world_size": 2})
    assert collective_limit(ranks) == {"ddp_timeout": 150}
    assert collective_limit(ranks, 1800) == {"ddp_timeout": 150} and collective_limit(ranks, 60) == {"ddp_timeout": 60}
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "150"
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60")
    collective_limit(ranks)
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "60", "the user's own stays"
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
