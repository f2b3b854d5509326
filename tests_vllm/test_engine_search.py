"""The commands with an engine in real processes: a whole probe, and a search that turns the engine's own keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import load_config
from grpo_autotune.knobs import TABLE
from grpo_autotune.records.search import SearchReport
from tests.support.training import text_config

RUNNING = "vllm.max_num_seqs"
BUDGET_S = 180
"""Twice what the search needs to try another engine; the rest goes into its race, in which each block starts one."""
GRACE_S = 60
EXACT = 1e-4


@pytest.fixture
def config(served: Callable[[str], Path], tmp_path: Path) -> Path:
    """LoRA with an engine that generates one completion after another."""
    knobs: dict[str, Any] = {row.key: None for row in TABLE if row.searched} | {RUNNING: [1, 8]}
    changes = {
        "search": {"knobs": knobs, "steps": 2},
        "vllm": {"max_model_len": 256, "gpu_memory_utilization": 0.1, "max_num_seqs": 1},
    }
    found = text_config(served("qwen3"), tmp_path, changes, use_vllm=True, max_completion_length=12)
    path = tmp_path / "grpo.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    return path


def run(folder: Path, *words: object) -> tuple[dict[str, Any], str]:
    """One command with `--json`, its engine sized by its share of memory; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": ""}
    done = subprocess.run(
        [sys.executable, "-m", "grpo_autotune", *map(str, words), "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=BUDGET_S + 3 * GRACE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def test_a_probe_tells_of_the_engine(config: Path, tmp_path: Path) -> None:
    report, _ = run(tmp_path, "probe", config, "--steps", 2)
    assert report["fidelity"]["ok"] and report["fidelity"]["max_nats"] < EXACT
    engine = report["engine"]
    assert engine["running_max"] == 1 and engine["start_s"] > 0
    assert {phase["name"] for phase in report["startup"]} >= {"engine"}


@pytest.mark.timeout(BUDGET_S + 4 * GRACE_S)
@pytest.mark.long
def test_a_search_turns_the_engines_keys(config: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    words = ["--budget", f"{BUDGET_S}s", "--run-dir", tmp_path / "run", "--out", tmp_path / "tuned.yaml"]
    printed, said = run(tmp_path, "search", config, *words)
    assert time.monotonic() - begun < BUDGET_S + GRACE_S
    found = SearchReport.model_validate(printed)
    statuses = [trial.status for trial in found.trials]
    assert {"ok"} <= set(statuses) <= {"ok", "timeout"}, said[-3000:]  # the budget may end while an engine starts
    assert "timeout" not in statuses or found.ended == "budget", said[-3000:]
    turned = [trial for trial in found.trials if trial.knobs.get(RUNNING) == 8]
    assert turned or found.ended == "budget", "time was left, and no trial had another engine than the user's"
    tuned = load_config(tmp_path / "tuned.yaml")
    assert tuned.use_vllm and tuned.vllm.max_model_len == 256
