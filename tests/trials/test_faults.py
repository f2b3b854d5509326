"""Every way a trial can end badly, with real processes: the status, one line, and nothing left running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.trials.endings import ending_of_exit
from grpo_autotune.trials.parent.runner import Runner
from tests.support.trials import marked, processes, spec_of


@pytest.fixture
def attempt(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrialOutcome]:
    """Run one trial, and see that nothing of it is left once it has failed."""

    def run(reward: str = "tests.support.training:uneven", call: int = 1, model: str = "", **spec: Any) -> TrialOutcome:
        monkeypatch.setenv("FAULT_AT_CALL", str(call))
        with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
            outcome = runner.run(spec_of(model or tiny("qwen3"), tmp_path, reward=reward, **spec))
            assert outcome.status != "ok"
            assert processes(mark) == []
        stored = (tmp_path / "trials" / "0000" / "outcome.json").read_text()
        assert TrialOutcome.model_validate_json(stored) == outcome
        return outcome

    return run


def test_a_reward_that_fails_in_the_second_step(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt("tests.support.faults:fails", call=2)
    assert (outcome.status, outcome.error_type) == ("reward_failed", "RewardError")
    assert outcome.why is not None and "raised KeyError: 'score'" in outcome.why and "\n" not in outcome.why


def test_memory_that_runs_out_in_step_3(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt("tests.support.faults:asks_too_much", call=3, steps=4)
    assert (outcome.status, outcome.error_type) == ("oom", "RuntimeError")
    assert outcome.why is not None and "DefaultCPUAllocator" in outcome.why
    assert outcome.overshoot_bytes is not None and 1 << 45 < outcome.overshoot_bytes < 1 << 46
    assert outcome.peak_bytes is not None and outcome.startup_s is not None
    assert outcome.rung == "grpo.per_device_train_batch_size 2"


def test_memory_that_runs_out_at_the_start(
    attempt: Callable[..., TrialOutcome], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_MODEL", str(tiny("qwen3")))
    outcome = attempt(model="tests.support.faults:model_that_asks_too_much")
    assert outcome.status == "oom", outcome.why
    assert outcome.record is None and outcome.startup_s is None


def test_a_hang_in_the_backward_pass(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt("tests.support.faults:hangs", call=2, hang_s=2.0)
    assert (outcome.status, outcome.why) == ("hang", "no sign of life for 2 s, in backward")


def test_a_limit_that_is_shorter_than_start_up(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt(limit_s=1.0)
    assert outcome.status == "timeout"
    assert outcome.why is not None and outcome.why.startswith("over its limit of 1 s, in start-up")


def test_a_worker_that_somebody_kills(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt("tests.support.faults:is_killed", call=2)
    assert (outcome.status, outcome.why) == ("killed", "ended by SIGKILL, which the search did not send")


def test_a_full_disk(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt("tests.support.faults:fills_the_disk", call=2)
    assert (outcome.status, outcome.why) == ("crashed", "its outcome could not be written (is the disk full?)")


def test_a_configuration_that_trl_refuses(attempt: Callable[..., TrialOutcome]) -> None:
    outcome = attempt(grpo={"optim": "nonsense"})
    assert (outcome.status, outcome.error_type) == ("invalid", "ConfigError")


def test_a_spec_that_is_no_configuration(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    spec = spec_of(tiny("qwen3"), tmp_path)
    spec = spec.model_copy(update={"config": {**spec.config, "gpro": {}}})
    with Runner(tmp_path) as runner:
        outcome = runner.run(spec)
    assert outcome.status == "invalid"
    assert outcome.why is not None and "gpro" in outcome.why


@pytest.mark.parametrize(
    ("code", "out_of_memory", "status"),
    [(-9, True, "oom"), (-9, False, "killed"), (-15, True, "killed"), (-11, False, "crashed"), (1, False, "crashed")],
)
def test_endings_without_an_outcome(code: int, out_of_memory: bool, status: str) -> None:
    ending = ending_of_exit(code, out_of_memory)
    assert ending.status == status and ending.why


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [
        (1, "Error out of memory at line 543 in file /src/csrc/ops.cu", "oom"),
        (-11, "Error out of memory at line 543 in file /src/csrc/ops.cu", "crashed"),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc", "oom"),
        (-6, "memory allocation of 65536 bytes failed", "oom"),
        (-6, "terminate called after throwing an instance of 'c10::Error'", "crashed"),
    ],
)
def test_a_library_that_ends_the_process_for_memory(tmp_path: Path, code: int, last: str, status: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text(f"step 3\n{last}\n")
    assert ending_of_exit(code, False, log).status == status
