"""What the probe says the engine did, held against what is known of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord

Colocated = Callable[..., Any]
Rows = list[dict[str, Any]]


def probed(trainer: Any, **settings: Any) -> ProbeRecord:
    probe = Probe(trainer, **settings)
    trainer.train()
    record = probe.record()
    probe.detach()
    return record


def test_tokens_requests_and_cache(colocated: Colocated, text_rows: Rows) -> None:
    record = probed(colocated("qwen3", text_rows, max_completion_length=8), warmup=0)
    engine, tokens = record.engine, record.tokens
    assert engine is not None and tokens is not None
    assert engine.generations == 3 and engine.source == "scheduler"
    assert engine.prompt_tokens == round(tokens.prompt_per_step * 3)
    assert engine.prefill_tokens + engine.cached_tokens == engine.prompt_tokens
    rows = 3 * 4
    assert engine.decode_tokens == round(tokens.completion_per_step * 3) - rows, "each first token ends a prefill"
    assert engine.prefill_tokens_per_s == pytest.approx(engine.prefill_tokens / engine.prefill_s)
    assert engine.decode_s > 0 and engine.decode_tokens_per_s is not None
    assert engine.running_max == 4 and 1 < (engine.running_mean or 0) <= 4 and engine.waiting_max == 0
    assert engine.kv_tokens is not None and 0 < (engine.kv_use_max or 0) < 0.1
    assert engine.preemptions == 0 and engine.images_encoded == 0
    assert engine.syncs == 3 and (engine.sync_s or 0) > 0 and engine.sync_bytes == record.weight_sync_bytes
    assert engine.sleep_s is None and engine.wake_s is None
    rows_s = {row.name: sum(row.per_step_s) for row in record.timings.stages}
    assert engine.prefill_s + engine.decode_s <= rows_s["generation"]


def test_fewer_places_than_requests_make_them_wait(
    colocated: Colocated, text_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.generation import vllm_generation

    engine = vllm_generation.LLM
    monkeypatch.setattr(vllm_generation, "LLM", lambda **keys: engine(**keys | {"max_num_seqs": 1}))
    found = probed(colocated("qwen3", text_rows, max_completion_length=8), warmup=0).engine
    assert found is not None
    assert found.running_max == 1 and found.waiting_max == 3 and found.running_mean == pytest.approx(1.0)


def test_shared_prefixes_come_from_the_cache(colocated: Colocated, text_rows: Rows) -> None:
    """Blocks of the cache hold 128 tokens here."""
    long = "What is two plus three? " * 32
    rows = [{**row, "prompt": [{"role": "user", "content": long}]} for row in text_rows]
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    found = probed(colocated("qwen3", rows, vllm_max_model_length=1024, **settings), warmup=0).engine
    assert found is not None
    assert found.cached_tokens == 3 * 3 * 128, "at each of three steps three of four copies find the first block"
    assert found.cached_tokens + found.prefill_tokens == found.prompt_tokens


def test_the_warm_up_is_left_out(colocated: Colocated, text_rows: Rows) -> None:
    found = probed(colocated("qwen3", text_rows), warmup=1).engine
    assert found is not None and found.generations == 2 and found.syncs == 2


def test_sleep_and_wake_are_timed(colocated: Colocated, text_rows: Rows) -> None:
    """The CPU build refuses to start with sleep mode but takes its calls, so TRL is told only once the engine runs."""
    trainer = colocated("qwen3", text_rows)
    trainer.vllm_generation.enable_sleep_mode = True
    trainer.vllm_generation._llm_weights_sleeping = False
    record = probed(trainer, warmup=0)
    assert record.engine is not None and record.fidelity is not None
    assert (record.engine.sleep_s or 0) > 0 and (record.engine.wake_s or 0) > 0
    assert record.fidelity.text_nats is not None and record.fidelity.moved is True
