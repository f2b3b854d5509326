"""Kernels of a step by stage, from activities that a GPU would report, on a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.probe import kernels
from grpo_autotune.probe.kernels import PASSES, Activity, KernelProfile, activities, kernels_by_stage
from grpo_autotune.probe.spans import Span, StepSpans
from grpo_autotune.records.probe import ProbeRecord, ProfiledStep

STEP = StepSpans(
    7,
    [
        Span("", "step", -1, 0, 0.0, host_s=10.0),
        Span("generation", "generate", 0, 1, 1.0, host_s=4.0),
        Span("weight_sync", "", 1, 2, 2.0, host_s=1.0),
        Span("backward", "", 0, 3, 6.0, host_s=2.0),
    ],
)
SECONDS = {"other": 4.0, "generation": 3.0, "weight_sync": 1.0, "backward": 2.0}


def launch(number: int, at: float) -> Activity:
    return Activity("cudaLaunchKernel", at, 1e-5, number, on_device=False)


def kernel(number: int, at: float, seconds: float, name: str = "gemm") -> Activity:
    return Activity(name, at, seconds, number, on_device=True)


def test_a_kernel_counts_for_the_stage_that_launched_it_however_late_it_runs() -> None:
    entries = [launch(1, 1.5), kernel(1, 5.5, 0.5), launch(2, 6.5), kernel(2, 9.0, 0.75), launch(3, 2.5)]
    entries += [kernel(3, 6.0, 0.25, "copy")]
    found = {row.stage: row for row in kernels_by_stage(STEP, entries, SECONDS)}
    assert {stage: (row.kernels, row.busy_s, row.seconds) for stage, row in found.items()} == {
        "generation": (1, 0.5, 3.0),
        "weight_sync": (1, 0.25, 1.0),
        "backward": (1, 0.75, 2.0),
        "other": (0, 0.0, 4.0),
    }


def test_kernels_beside_each_other_are_busy_once_and_a_graph_is_one_launch() -> None:
    entries = [launch(1, 7.0), kernel(1, 7.0, 1.0, "a"), kernel(1, 7.5, 1.0, "b"), kernel(1, 7.5, 0.25, "b")]
    (row,) = kernels_by_stage(STEP, entries, {"backward": 2.0})
    assert (row.kernels, row.launches, row.busy_s) == (3, 1, 1.5)
    assert [(top.name, top.count, top.seconds) for top in row.top] == [("b", 2, 1.25), ("a", 1, 1.0)]


def test_what_was_not_recorded_is_no_idle_time() -> None:
    entries = [launch(1, 1.5), kernel(1, 1.5, 0.5)]
    (row,) = kernels_by_stage(STEP, entries, {"generation": 3.0}, paused=[(3.0, 5.5)])
    assert row.stage == "generation" and row.seconds == 1.0
    step = ProfiledStep(step=7, micro_batches=2, tokens=4, stages=[row])
    assert step.busy_share("generation") == 0.5 and step.per_token() == 0.25
    assert step.busy_share("backward") is None and step.per_micro_batch(("generation",)) == 0.5


def test_a_generation_is_recorded_for_some_passes_and_what_follows_it_is_again(monkeypatch: pytest.MonkeyPatch) -> None:
    toggled: list[bool] = []
    profiler = SimpleNamespace(
        start=lambda: None,
        stop=lambda: None,
        toggle_collection_dynamic=lambda on, kinds: toggled.append(on),
        profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=list)),
    )
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    model, generating, capturing = torch.nn.Linear(1, 1), True, True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    profile = KernelProfile(model, lambda: generating)
    for _ in range(PASSES + 5):
        model(torch.zeros(1))
    assert toggled == [], "a graph that is being captured cannot wait for the device"
    capturing = False
    model(torch.zeros(1))
    assert toggled == [False]
    generating = False
    model(torch.zeros(1))
    assert toggled == [False, True] and len(profile.paused) == 1
    assert profile.stop() == [] and not model._forward_pre_hooks
    profiler.start = lambda: torch.zeros(2) @ torch.zeros(3)  # another one is at work
    with pytest.raises(RuntimeError):
        KernelProfile(model, lambda: generating)
    assert not model._forward_pre_hooks


def test_a_real_profile_of_a_cpu_has_calls_and_no_device_work() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(8, 8) @ torch.ones(8, 8)
    found = activities(profiler)
    assert "aten::mm" in {entry.name for entry in found} and not any(entry.on_device for entry in found)
    assert kernels_by_stage(STEP, found, SECONDS) == []


def test_the_device_s_own_notes_are_no_work() -> None:
    def event(kind: str, device: Any) -> Any:
        values = {"name": kind, "start_ns": 10**9, "duration_ns": 500, "correlation_id": 3}
        values |= {"device_type": device, "activity_type": kind}
        return SimpleNamespace(**{name: (lambda value=value: value) for name, value in values.items()})

    device = torch._C._autograd.DeviceType
    events = [
        event("kernel", device.CUDA),
        event("gpu_user_annotation", device.CUDA),
        event("cuda_runtime", device.CPU),
    ]
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    assert [(entry.name, entry.start_s, entry.on_device) for entry in activities(profiler)] == [
        ("kernel", 1.0, True),
        ("cuda_runtime", 1.0, False),
    ]
    assert kernels.busy(activities(profiler)[:1]) == pytest.approx(5e-7)


class HostTimer:
    """The host's clock in a GPU's place."""

    def mark(self) -> float:
        return time.perf_counter()

    def done(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class KernelPerPass:
    """In place of the profiler: each pass of the model launches a kernel of a microsecond."""

    paused: list[Any] = []

    def __init__(self, model: torch.nn.Module, generating: Callable[[], bool]) -> None:
        self.entries: list[Activity] = []
        self.hook = model.register_forward_pre_hook(self.launched)

    def launched(self, *_: Any) -> None:
        number, now = len(self.entries), time.perf_counter()
        self.entries += [launch(number, now), kernel(number, now + 1.0, 1e-6)]

    def stop(self) -> list[Activity]:
        self.hook.remove()
        return self.entries


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a probe has of a GPU, by stand-ins."""
    from grpo_autotune.probe import probe

    monkeypatch.setattr(probe, "gauges_for", lambda device: (HostTimer(), None))
    monkeypatch.setattr(probe, "KernelProfile", KernelPerPass)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("generations", [1, 2])
def test_the_last_step_that_is_not_measured_is_profiled(
    tiny: Callable[[str], Path], tmp_path: Path, text_rows: list[dict[str, Any]], generations: int
) -> None:
    from grpo_autotune.probe.probe import Probe
    from tests.support.trainers import make_trainer

    often = {"steps_per_generation": 2 // generations, "generation_kwargs": {"min_new_tokens": 6}}
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **often)
    probe = Probe(trainer, profile=True)
    trainer.train()
    probe.detach()
    record = probe.record()
    assert record.timings.steps == [3] and record.profiled is not None
    assert (record.profiled.step, record.profiled.micro_batches) == (2, 2)
    assert record.profiled.tokens == 6 * generations and record.profiled.per_token() == 1.0
    by_stage = {row.stage: row.kernels for row in record.profiled.stages if row.kernels}
    assert by_stage == {"generation": 6 * generations, "policy_logprob": 2}
    assert record.profiled.per_micro_batch(("policy_logprob",)) == 1.0


@pytest.mark.usefixtures("gpu")
def test_a_training_that_fails_in_the_profiled_step_leaves_no_profile(
    tiny: Callable[[str], Path], tmp_path: Path, text_rows: list[dict[str, Any]]
) -> None:
    from grpo_autotune.probe.probe import Probe
    from tests.support.trainers import make_trainer

    hooks: list[int] = []

    def judge(completions: list[Any], **kwargs: Any) -> list[float]:
        hooks.append(len(trainer.model._forward_pre_hooks))
        if trainer.state.global_step == 1:
            raise RuntimeError("the judge is gone")
        return [0.5] * len(completions)

    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=[judge], lora=False)
    probe = Probe(trainer, profile=True)
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.train()
    assert hooks == [0, 1] and not trainer.model._forward_pre_hooks
    probe.detach()


@pytest.mark.usefixtures("gpu")
def test_a_probe_by_the_command_has_a_profile(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_autotune.commands import probe
    from tests.support.training import text_config

    for name in ("set_environment", "mend_torchvision"):
        monkeypatch.setattr(probe, name, lambda: None)
    monkeypatch.setattr(probe, "expand_segments", lambda environment: None)
    monkeypatch.setattr(probe, "report_of", lambda record, config: record)
    shown: list[ProbeRecord] = []
    config = text_config(tiny("qwen3"), tmp_path)
    probe.probe_config(config, steps=1, out_dir=tmp_path, output=nullcontext(), show=shown.append)
    (record,) = shown
    assert record.profiled is not None and record.timings.steps == [3]
