"""Trials with an engine in the training process, or in a server of their own: one engine for those that ask for equal
ones, and a length a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.records.trial import SERVER_LOG, TrialSpec
from grpo_autotune.trials.parent.runner import Runner
from tests.support.training import text_config
from tests.support.trials import marked, processes, spec_of

EXACT = 1e-4
"""Nats, in float32."""


@pytest.mark.timeout(900)
def test_a_warm_worker_keeps_the_engine(
    served: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo = {"use_vllm": True, "steps_per_generation": 2}
    specs = [
        spec_of(served("qwen3"), tmp_path, number, grpo={**grpo, "beta": beta}, completion_lengths=[2, 5], limit_s=400)
        for number, beta in enumerate((0.0, 0.04))
    ]
    with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
        cold, warm = (runner.run(spec) for spec in specs)
    assert processes(mark) == []
    assert (cold.status, warm.status) == ("ok", "ok"), (cold.why, warm.why)
    assert warm.warm and cold.record is not None and warm.record is not None
    assert "engine" in {phase.name for phase in cold.record.startup}
    for outcome in (cold, warm):
        assert outcome.record is not None and outcome.record.tokens is not None
        assert 2 <= outcome.record.tokens.completion.mean <= 5 and outcome.record.tokens.completion.max == 5
        assert outcome.record.fidelity is not None and outcome.record.fidelity.ok
        assert outcome.notes == ["vLLM's completions end by length, so that TRL counts each as truncated"]
    log = (tmp_path / "trials" / "0001" / "log.txt").read_text()
    assert "Initializing a V1 LLM engine" not in log


@pytest.mark.timeout(900)
@pytest.mark.long
def test_trials_share_a_server_of_their_own(
    served: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grpo = {"use_vllm": True, "steps_per_generation": 2}
    specs = [spec_of(served("qwen3"), tmp_path, number, grpo=grpo, limit_s=400) for number in range(2)]
    own = {"server_gpus": 0, "max_model_len": 256}
    specs = [spec.model_copy(update={"config": {**spec.config, "vllm": own}}) for spec in specs]
    with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
        first, second = (runner.run(spec) for spec in specs)
    assert processes(mark) == []
    assert (first.status, second.status) == ("ok", "ok"), (first.why, second.why)
    assert not first.warm and second.warm
    assert first.startup_s is not None and second.startup_s is not None and second.startup_s < first.startup_s
    for outcome in (first, second):
        assert outcome.record is not None and outcome.record.fidelity is not None and outcome.record.fidelity.ok
        assert outcome.record.engine is not None and outcome.record.engine.source == "server"
    assert [(tmp_path / "trials" / f"000{n}" / SERVER_LOG).exists() for n in range(2)] == [True, False]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_server_gives_the_trainers_log_probs(served: Callable[[str], Path], tmp_path: Path) -> None:
    """Llama, which `test_serve_vllm` and the test above leave out."""
    own = {"vllm": {"server_gpus": 0, "max_model_len": 256}}
    config = text_config(served("llama"), tmp_path, own, use_vllm=True).to_dict()
    with Runner(tmp_path) as runner:
        outcome = runner.run(TrialSpec(number=0, config=config, steps=2, limit_s=400))
    assert outcome.status == "ok", outcome.why
    assert outcome.record is not None and outcome.record.engine is not None and outcome.record.fidelity is not None
    assert outcome.record.engine.source == "server" and outcome.record.fidelity.max_nats < EXACT
