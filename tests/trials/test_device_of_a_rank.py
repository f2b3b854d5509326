"""Trials on a GPU that is only counted: which memory is theirs, and what a device that failed leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.probe.gauges import CudaGauge
from grpo_autotune.probe.spans import SpanRecorder
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.probe import DeviceMemory
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.scripts.hooks import ScriptHooks
from grpo_autotune.scripts.values import ScriptValues
from grpo_autotune.trials.child.execute import TrialExecutor
from grpo_autotune.trials.child.memory import MemoryMeter
from grpo_autotune.trials.heartbeat import HeartbeatWriter
from grpo_autotune.trials.parent.folder import read_outcome
from tests.support.fake_cuda import GIB, FakeCuda, cuda

__all__ = ["cuda"]


class Timer:
    """The device's clock, which stands still."""

    def mark(self) -> int:
        return 0

    def done(self, mark: int) -> bool:
        return True

    def wait(self, mark: int) -> None:
        pass

    def seconds(self, begin: int, end: int) -> float:
        return 0.0


def test_a_trial_needs_the_peak_between_two_edges_and_not_the_cache(cuda: FakeCuda) -> None:
    meter = MemoryMeter()
    recorder = SpanRecorder(timer=Timer(), memory=CudaGauge())
    recorder.open_root()
    span = recorder.begin("backward")
    cuda.allocate(10 * GIB)
    cuda.reserved = cuda.reserved_peak = 34 * GIB
    cuda.allocate(-9 * GIB)
    recorder.end(span)
    for stage in ("optimizer", "optimizer", "log_save_eval"):
        recorder.end(recorder.begin(stage))
        cuda.empty_cache()
    recorder.close_root(1)
    facts = meter.facts()
    assert facts["peak_bytes"] - facts["idle_bytes"] == 10 * GIB
    ran_out = meter.facts(ran_out=True)
    assert ran_out["peak_bytes"] - ran_out["idle_bytes"] == 34 * GIB


def test_the_peak_is_read_where_the_stage_changes(cuda: FakeCuda) -> None:
    gauge, readings = CudaGauge(), []
    recorder = SpanRecorder(timer=Timer(), memory=lambda: readings.append(gauge()) or readings[-1])
    recorder.open_root()
    outer = recorder.begin("generation")
    inner = recorder.begin("generation", "decode")
    cuda.allocate(GIB)
    cuda.allocate(-GIB)
    recorder.end(inner)
    assert len(readings) == 2
    recorder.end(outer)
    assert outer.peak_bytes == GIB and len(readings) == 3


def test_a_machine_with_a_gpu_may_train_on_its_processor(cuda: FakeCuda) -> None:
    cuda.started = False
    facts = MemoryMeter().facts()
    assert facts["peak_bytes"] >= facts["idle_bytes"] > 0 and "device_memory" not in facts
    assert cuda.calls == []  # nor does a rank open a context before its device is set


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[TrialOutcome, TrialExecutor]]:
    """Run a script as a trial does, but for its layers on TRL's classes, which would stay in this process."""
    monkeypatch.setattr(ScriptValues, "on_config_module", lambda values, module: None)
    for layers in ("on_trainer_module", "_on_engine_module"):
        monkeypatch.setattr(ScriptHooks, layers, lambda hooks, module: None)
    monkeypatch.setattr("grpo_autotune.trials.child.script._ScriptTrial.on_trainer_module", lambda trial, module: None)

    def run_script(text: str) -> tuple[TrialOutcome, TrialExecutor]:
        script, executor = tmp_path / "train.py", TrialExecutor()
        script.write_text(f"import torch\n{text}\n")
        spec, heartbeat = TrialSpec(number=0, config={}, script=[str(script)]), HeartbeatWriter(tmp_path)
        outcome = executor.execute(spec, tmp_path, Startup(born_s=0.0), heartbeat)
        heartbeat.close()
        return outcome, executor

    return run_script


FAILS = 'torch.cuda.failure = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")'
NO_ROOM = 'raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")'


def test_a_failed_device_ends_the_trial_with_an_outcome_and_the_worker_with_it(cuda: FakeCuda, run: Callable) -> None:
    outcome, executor = run(f"{FAILS}\nraise torch.cuda.failure")
    assert (outcome.status, outcome.error_type) == ("crashed", "AcceleratorError")
    assert outcome.why is not None and outcome.why.startswith("the GPU failed") and not executor.reusable
    cuda.failure = None
    outcome, executor = run(f"{FAILS}\n{NO_ROOM}")  # the library was the first to meet it
    assert (outcome.status, outcome.error_type) == ("crashed", "AcceleratorError") and not executor.reusable


def test_a_library_without_room_is_memory(cuda: FakeCuda, run: Callable) -> None:
    outcome, _ = run(f"torch.cuda.allocate({70 * GIB})\n{NO_ROOM}")
    assert outcome.status == "oom" and outcome.device_memory is not None
    assert outcome.peak_bytes == 70 * GIB == outcome.device_memory.reserved_bytes
    assert TrialOutcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_the_memory_of_several_ranks_is_that_of_the_rank_with_most(tmp_path: Path) -> None:
    for rank, name in enumerate(("outcome.json", "outcome.rank1.json")):
        sizes = {"allocated_bytes": rank, "reserved_bytes": rank, "outside_bytes": 0, "device_bytes": rank}
        device = DeviceMemory(**sizes, retries=0, failures=0)
        outcome = TrialOutcome(number=0, status="ok", peak_bytes=rank, idle_bytes=0, device_memory=device)
        (tmp_path / name).write_text(outcome.model_dump_json())
    read = read_outcome(tmp_path, TrialSpec(number=0, config={}, world_size=2), None)
    assert read.device_memory is not None and (read.peak_bytes, read.device_memory.allocated_bytes) == (1, 1)
