"""Speed-ups on two processes (gloo): the same rewards and weights, also where one of them has nothing but dead rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_autotune.processes.fresh import free_port

ROOT = Path(__file__).parents[2]

SHARED = ("whole groups", "a group over both")


@pytest.mark.timeout(600)
def test_two_processes(tiny, tmp_path):
    models = tiny("qwen3").parent
    assert tiny("qwen3_vl").parent == tiny("llama").parent == models
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, "-m", "tests.support.pairs_ranks", str(models), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for case in first:
        for found in (first[case], second[case]):
            assert found["same_rewards"], case
            assert found["gap"] < 1e-6, case
        if case in SHARED:
            continue
        assert first[case]["facts"]["skip_dead"] == {"rows": 40.0, "skipped_rows": 20.0}, case
        assert second[case]["facts"]["skip_dead"] == {"rows": 40.0, "skipped_rows": 40.0}, case
    for case in SHARED:
        for found in (first[case], second[case]):
            assert found["on"] == ["shared_prefix"]
            facts = found["facts"]["shared_prefix"]
            assert facts["plain_passes"] == 0 and facts["tokens"] < facts["tokens_of_plain"], case
    assert first["full vision"]["facts"]["images_once"]["processed"] <= 4
    assert {"shared_prefix", "shared_prefill", "images_once", "vision_cache", "merge_passes"} <= set(
        first["adapters"]["on"]
    )
    assert first["adapters"]["facts"]["merge_passes"]["passes"] < 20.0
