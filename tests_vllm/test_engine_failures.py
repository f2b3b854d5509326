"""Engines that do not start, for real: known by type and by the raising function, with a setting that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from traceback import format_exception
from typing import Any

import pytest
from vllm import LLM

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.failures import EngineFailure, engine_failure
from grpo_autotune.rollout.server.log import logged_failure
from grpo_autotune.train.arguments import as_config_errors
from grpo_autotune.train.trainer import build_trainer
from grpo_autotune.trials.endings import ending_of_error
from tests.support.training import text_config
from tests_vllm.conftest import TRL_SETS

ROOMY = 100_000_000
"""Tokens whose keys and values no test machine holds: 24 GiB in the tiny Qwen3."""

Served = Callable[[str], Path]


def start(model: Path, **keys: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        LLM(**{"model": str(model), "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 4096, **keys})
    return caught.value


def failed(model: Path, **keys: Any) -> EngineFailure:
    error = start(model, **keys)
    found = engine_failure(error)
    assert found is not None
    assert logged(error) == (found if found.status == "oom" else None)
    return found


def logged(error: BaseException) -> EngineFailure | None:
    """What a server's log would tell of it."""
    with NamedTemporaryFile("w") as log:
        lines = "".join(format_exception(error)).splitlines(keepends=True)
        log.write("(EngineCore pid=1) ERROR [core.py:1] ".join(lines))
        log.write("\nRuntimeError: Engine core initialization failed. See root cause above.\n")
        log.flush()
        return logged_failure(Path(log.name))


def test_keys_and_values_do_not_fit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    error = start(served("qwen3"), max_model_len=ROOMY)
    found = engine_failure(error)
    assert (
        found is not None and found == logged(error) and found.status == "oom" and found.where == "vllm.max_model_len"
    )
    assert found.available_bytes == 1 << 30 and found.needed_bytes is not None and found.needed_bytes > 20 << 30
    assert found.longest is not None and 256 < found.longest < ROOMY
    assert f"Set vllm.max_model_len to {found.longest} or less, or raise" in found.fix
    assert "VLLM_CPU_KVCACHE_SPACE (GiB) by 23" in found.fix
    trial = ending_of_error(error, lambda: None)
    assert trial.status == "oom" and trial.error_type == "ValueError"
    assert trial.overshoot_bytes == found.needed_bytes - found.available_bytes
    engine = LLM(model=str(served("qwen3")), max_model_len=found.longest, max_num_seqs=4, max_num_batched_tokens=4096)
    engine.llm_engine.engine_core.shutdown()  # the length that was suggested starts


def test_a_share_that_is_not_free(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    found = failed(served("qwen3"), gpu_memory_utilization=0.999)
    assert found.status == "oom" and found.where == "vllm.gpu_memory_utilization"
    assert found.needed_bytes is not None and found.available_bytes is not None
    assert found.needed_bytes > found.available_bytes
    share = re.search(r"Set it to ([\d.]+) or less", found.fix)
    assert share is not None and 0 < float(share[1]) < 0.999


def test_a_share_that_the_process_fills(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    found = failed(served("qwen3"), gpu_memory_utilization=0.005)
    share = re.search(r"Set it to ([\d.]+) or more", found.fix)
    assert found.status == "oom" and share is not None
    engine = LLM(model=str(served("qwen3")), max_model_len=256, gpu_memory_utilization=float(share[1]))
    engine.llm_engine.engine_core.shutdown()


def test_space_that_is_not_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000")
    found = failed(served("qwen3"))
    assert (found.status, found.where, found.needed_bytes) == ("oom", "VLLM_CPU_KVCACHE_SPACE", 1000 << 30)
    assert re.search(r"^Set it to \d+ or less$", found.fix)


def test_what_vllm_refuses_is_invalid(served: Served) -> None:
    found = failed(served("qwen3"), max_num_batched_tokens=2)
    assert (found.status, found.where) == ("invalid", "vllm.max_num_batched_tokens")
    assert "must be greater than or equal to max_num_seqs (4)" in found.what
    assert failed(served("qwen3"), max_model_len=100_000).where == "vllm.max_model_len"


def test_other_errors_are_none_of_it(tmp_path: Path) -> None:
    assert engine_failure(start(tmp_path / "not_there")) is None
    assert engine_failure(ValueError("No available memory for the cache blocks.")) is None  # words alone say nothing
    with pytest.raises(ConfigError, match=r"^grpo: something$"), as_config_errors("grpo"):
        raise ValueError("something")


def test_training_says_it_in_one_line(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRL_SETS:  # TRL sets them before it starts an engine
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000")
    config = text_config(served("qwen3"), tmp_path, {"vllm": {"max_model_len": 256}}, use_vllm=True)
    with pytest.raises(ConfigError, match=r"^VLLM_CPU_KVCACHE_SPACE: 1000\.00 GiB is asked for") as caught:
        build_trainer(config)
    assert "\n" not in str(caught.value)
    assert ending_of_error(caught.value, lambda: None).status == "oom"
