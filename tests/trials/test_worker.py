"""What a worker does in its own process: why a trial failed, memory, purposes, and a process left as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin
from trl import GRPOTrainer

from grpo_autotune.errors import ConfigError, DataError, EnvironmentProblem, RewardError
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.scripts.values import ScriptValues, load_script_values
from grpo_autotune.trials.child.execute import TrialExecutor
from grpo_autotune.trials.child.memory import MemoryMeter, available_bytes, release
from grpo_autotune.trials.child.warm_state import DataCache, EngineCache, NeedsFreshWorker
from grpo_autotune.trials.endings import ending_of_error
from grpo_autotune.trials.heartbeat import HeartbeatReader, HeartbeatWriter
from tests.support.faults import TOO_MUCH
from tests.support.trials import spec_of

GIB = 1 << 30


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def real_allocation_error() -> Exception:
    with pytest.raises(RuntimeError) as found:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    return found.value


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.10 GiB of which 3.00 GiB is free"
RUNS_OUT: list[tuple[Exception, int | None]] = [
    (torch.OutOfMemoryError(CUDA), 17 * GIB),
    (MemoryError(), None),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    (RuntimeError("std::bad_alloc"), None),
    (RuntimeError("unable to mmap 345248 bytes from file <model.safetensors>: Cannot allocate memory (12)"), None),
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), None),
    (RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:62"), None),
    (caused(RewardError("raised MemoryError: ", where="reward judge"), MemoryError()), None),
    (caused(ConfigError("cannot load m"), OSError(errno.ENOMEM, "Cannot allocate memory")), None),
]


@pytest.mark.parametrize(("error", "overshoot"), RUNS_OUT)
def test_memory_is_known_by_what_was_raised(error: Exception, overshoot: int | None) -> None:
    failure = ending_of_error(error, lambda: GIB)
    assert (failure.status, failure.overshoot_bytes) == ("oom", overshoot)
    assert failure.why and "\n" not in failure.why


def test_torchs_own_refusal_says_how_much_was_missing() -> None:
    failure = ending_of_error(real_allocation_error(), lambda: GIB)
    assert (failure.status, failure.error_type, failure.overshoot_bytes) == ("oom", "RuntimeError", TOO_MUCH - GIB)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RewardError("raised KeyError"), "reward_failed"),
        (ConfigError("no"), "invalid"),
        (EnvironmentProblem("no vLLM"), "invalid"),
        (DataError("row 3"), "invalid"),
        (RuntimeError("the judge said: out of memory"), "crashed"),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), "crashed"),
        (RuntimeError("can't start new thread"), "crashed"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed"),
    ],
)
def test_other_errors_go_by_their_type_and_never_by_words(error: Exception, status: str) -> None:
    assert ending_of_error(error, lambda: GIB).status == status


def test_a_gpu_that_failed_is_nobody_elses_fault() -> None:
    error = torch.AcceleratorError(
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"
    )
    for met in (error, caused(RewardError("raised AcceleratorError", where="reward judge"), error)):
        ending = ending_of_error(met, lambda: GIB)
        assert (ending.status, ending.error_type) == ("crashed", "AcceleratorError")
        assert "the GPU failed" in ending.why and "device-side assert triggered (an earlier call" in ending.why


def test_an_error_that_was_raised_from_itself_ends_a_trial_like_any_other() -> None:
    error = ValueError("no judge")
    assert ending_of_error(caused(error, error), lambda: GIB) == ("crashed", "ValueError: no judge", "ValueError", None)


def test_a_thread_without_room_for_its_stack_is_memory() -> None:
    for room in (1 << 20, None):  # None: it cannot be read
        assert ending_of_error(RuntimeError("can't start new thread"), lambda room=room: room).status == "oom"


@pytest.mark.slow
def test_the_peak_is_this_trials_and_falls_again() -> None:
    size = 256 << 20
    first = MemoryMeter()
    held = torch.ones(size // 4)
    assert first.facts()["peak_bytes"] - first.idle.host > 0.9 * size
    del held
    release()
    second = MemoryMeter()
    assert second.idle.host < first.idle.host + 0.5 * size
    assert second.facts()["peak_bytes"] - second.idle.host < 0.5 * size
    left = available_bytes()
    assert left is not None and left > 0


@pytest.mark.slow
def test_a_limit_on_addresses_is_one_on_what_a_process_can_hold() -> None:
    code = """
import resource, psutil
from grpo_autotune.trials.child.execute import TrialExecutor
from grpo_autotune.trials.child.memory import in_use, most_bytes
assert most_bytes() is None
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (512 << 20), resource.RLIM_INFINITY))
before, held = most_bytes(), []
try:
    while True:
        held.append(bytearray(b"x" * (4 << 20)))
except MemoryError:
    print(before, most_bytes(), in_use())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, held = map(int, found.stdout.split())
    assert abs(before - held) < 64 << 20 and abs(after - held) < 16 << 20


def test_a_reader_sees_each_beat_once(tmp_path: Path) -> None:
    heartbeat, reader = HeartbeatWriter(tmp_path), HeartbeatReader(tmp_path)
    assert not reader.moved()
    startup = Startup(born_s=0.0)
    startup.tell = heartbeat.starting
    with startup.phase("model"):
        assert reader.moved() and reader.progress.stage == "start-up: model" and not reader.began
        assert not reader.moved()
    heartbeat.of = 3
    heartbeat.begin()
    heartbeat.again()
    assert reader.moved() and reader.began and reader.progress == ("step", 0, 3)
    HeartbeatWriter(tmp_path, silent=True).beat("another rank")
    assert not reader.moved()
    heartbeat.close()


@pytest.mark.slow
def test_a_worker_prints_what_its_encoding_does_not_have() -> None:
    code = "from grpo_autotune.trials.child import worker; worker.main([]); print('答')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, input="", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u7b54\n"


@pytest.fixture
def serve(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., TrialOutcome]:
    executor = TrialExecutor()

    def run(**spec: Any) -> TrialOutcome:
        heartbeat = HeartbeatWriter(tmp_path)
        outcome = executor.execute(spec_of(tiny("qwen3"), tmp_path, **spec), tmp_path, Startup(born_s=0.0), heartbeat)
        heartbeat.close()
        return outcome

    return run


def test_purposes(serve: Callable[..., TrialOutcome]) -> None:
    probe, worst, rewards = (serve(purpose=purpose) for purpose in ("probe", "worst_case", "rewards"))
    assert [outcome.status for outcome in (probe, worst, rewards)] == ["ok"] * 3, (probe.why, worst.why, rewards.why)
    assert worst.record is not None and worst.record.tokens is not None
    tokens = worst.record.tokens
    assert tokens.completion.p50 == tokens.completion.max == 6 and tokens.truncated_share == 1.0
    assert probe.record is not None and probe.record.tokens is not None
    assert tokens.prompt.mean > probe.record.tokens.prompt.mean
    assert rewards.record is None and len(rewards.step_s) == 2
    assert [row.prompt for row in rewards.rewards] == [0, 1, 2, 3]
    seen = [length for group in probe.lengths for length in group]
    assert max(seen) <= 6 and len({len(group) for group in probe.lengths}) == 1 and not worst.lengths
    assert probe.record.tokens.completion.max in seen
    assert probe.idle_bytes == worst.idle_bytes  # this process's own, before its first model


def test_what_a_probe_of_few_steps_misses_is_measured_after_them(
    serve: Callable[..., TrialOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    evaluate = GRPOTrainer.evaluate

    def counted(self: GRPOTrainer, held_out: Any = None, **more: Any) -> Any:
        rows.append(0 if held_out is None else len(held_out))
        return evaluate(self, held_out, **more)

    monkeypatch.setattr(GRPOTrainer, "evaluate", counted)
    keys = {"eval_strategy": "steps", "eval_steps": 50, "per_device_eval_batch_size": 4, "save_steps": 50}
    data = {"eval_split": "train[:6]"}
    rare = serve(purpose="probe", data=data, grpo=keys)
    assert rare.record is not None, rare.why
    assert rare.record.occasions["evaluate"] > 0.0 < rare.record.occasions["save"] and rows == [2]
    assert 0.0 < rare.record.occasions_s < rare.record.occasions["evaluate"] + rare.record.occasions["save"]
    assert len(rare.step_s) == 2 and not list(tmp_path.rglob("checkpoint-*"))
    often = serve(purpose="probe", data=data, grpo={**keys, "eval_steps": 1, "save_strategy": "no"})
    assert often.record is not None and often.record.occasions == {} and set(rows[1:]) == {0}


def test_memory_that_runs_out_is_not_hidden_by_smaller_batches(
    serve: Callable[..., TrialOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    outcome = serve(grpo={"auto_find_batch_size": True})
    assert outcome.status == "oom" and len(calls) == 1


def test_rewards_are_those_of_training(serve: Callable[..., TrialOutcome], tmp_path: Path, monkeypatch: Any) -> None:
    """Sampled by the trainer's own path, judged by the configured rewards, in the order of the data."""
    monkeypatch.setenv("REMEMBERED", str(tmp_path / "calls"))
    found = serve(purpose="rewards", reward="tests.support.faults:remembers", steps=2)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    ids = [row for call in calls for row in call["completions"]]
    wanted = [len(set(row)) / 8 + (sum(row) % 7) / 10 for row in ids]
    assert [reward for row in found.rewards for reward in row.rewards] == pytest.approx(wanted)
    assert sum(row.truncated for row in found.rewards) <= len(ids) == 16


def test_a_run_that_is_configured_shorter_than_the_trial_goes_on(serve: Callable[..., TrialOutcome]) -> None:
    outcome = serve(grpo={"max_steps": 1}, steps=3, warmup=2)
    assert outcome.status == "ok" and len(outcome.step_s) == 3
    assert outcome.record is not None and len(outcome.record.timings.warmup_s) == 2
    epochs = serve(grpo={"max_steps": -1, "num_train_epochs": 1}, steps=7)
    assert len(epochs.step_s) == 7


def test_whole_cycles_are_measured(serve: Callable[..., TrialOutcome]) -> None:
    outcome = serve(grpo={"num_iterations": 2, "max_steps": 20}, steps=3)
    assert outcome.record is not None and outcome.record.timings.cycle == 2
    assert (len(outcome.step_s), len(outcome.record.timings.warmup_s)) == (4, 2)


def test_data_is_read_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from grpo_autotune.config.schema import RunConfig

    config = RunConfig.from_dict(spec_of(tiny("qwen3"), tmp_path).config)
    said: list[str] = []
    kept = DataCache()
    assert kept.load(config, said.append)[0] is kept.load(config, said.append)[0]
    assert len(said) == 1
    grpo = {**config.grpo, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    with pytest.raises(ConfigError, match="8 rows"):
        kept.load(config.model_copy(update={"grpo": grpo}), said.append)


class Engine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")


def test_an_engine_is_given_again_for_equal_arguments_only() -> None:
    kept = EngineCache()
    first = kept._start(lambda **arguments: Engine(), model="m", enable_sleep_mode=True)
    assert kept._start(lambda **arguments: Engine(), model="m", enable_sleep_mode=True) is first
    assert first.calls == ["wake_up", "reset_prefix_cache"]
    with pytest.raises(NeedsFreshWorker):
        kept._start(lambda **arguments: Engine(), model="m", enable_sleep_mode=False)


@pytest.mark.slow
def test_nothing_loads_torch_before_a_script_does() -> None:
    """The script may set environment variables that torch reads when it is imported."""
    code = "import sys, grpo_autotune.trials.child.worker, grpo_autotune.commands.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_knobs_of_a_script() -> None:
    knobs = {"grpo.beta": 0.1, "max_steps": 3, "vllm.gpu_memory_utilization": 0.3, "data.image_size": 384}
    assert ScriptValues(knobs).grpo == {"beta": 0.1, "max_steps": 3, "vllm_gpu_memory_utilization": 0.3}
    for knob in ("grpo.betta", "model.dtype", "data.path", "vllm.swap"):
        with pytest.raises(ConfigError, match=knob):
            ScriptValues({knob: 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo: {num_generations: eight}", "grpo.num_generations: 'eight' is not accepted. Accepted: a whole number"),
        ("grpo: {bf16: 'no'}", "grpo.bf16: 'no' is not accepted. Accepted: true or false"),
        (
            "{grpo: {vllm_gpu_memory_utilization: 0.3}, vllm: {gpu_memory_utilization: 0.5}}",
            "vllm.gpu_memory_utilization: set to 0.5, but grpo.vllm_gpu_memory_utilization, TRL's key for the same "
            "setting, is 0.3. Remove one of the two keys.",
        ),
        (
            "{grpo: {vllm_enable_sleep_mode: true}, vllm: {sleep_level: 0}}",
            "vllm.sleep_level: set to 0, but grpo.vllm_enable_sleep_mode, TRL's key for the same setting, is true.",
        ),
        ("vllm: {server_gpus: 1}", "vllm.server_gpus: a script's run does not start a server of its own. Start one"),
        ("{grpo: {vllm_max_model_length: 99}, vllm: {max_model_len: 99}}", None),
    ],
)
def test_values_of_a_script_that_cannot_be_given(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "tuned.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") if message else nullcontext():
        load_script_values(tmp_path / "tuned.yaml")


def test_a_spec_survives_json() -> None:
    spec = TrialSpec(number=3, config={}, knobs={"grpo.beta": 0.0})
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
