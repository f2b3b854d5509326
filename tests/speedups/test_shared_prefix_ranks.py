"""Two processes under DistributedDataParallel: whole groups on each, and one group split over both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

WHOLE = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
SPLIT = {"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def on_two_ranks(*words: object) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, "-m", "tests.support.exactness_ranks", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ranks')]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "lora", "grpo"),
    [
        ("text", 0, WHOLE | {"gradient_checkpointing": True}),
        ("picture", 1, SPLIT | {"gradient_checkpointing": False}),
    ],
    ids=["whole groups", "a group over both ranks"],
)
def test_two_ranks_train_as_plain_trl_does(tiny, tmp_path, kind, lora, grpo):
    model = tiny("qwen3_vl" if kind == "picture" else "llama")
    settings = json.dumps(grpo | {"max_steps": 3, "beta": 0.05, "max_completion_length": 8})
    found = on_two_ranks(model, tmp_path, kind, lora, settings, "shared_prefix")
    assert len(found) == 2
    for rank in found:
        assert rank["ranks"] == 2 and rank["rewards"] and rank["on"] == ["shared_prefix"]
        assert rank["apart"] <= 1e-5
        facts = rank["facts"]["shared_prefix"]
        assert facts["plain_passes"] == 0 and facts["tokens"] < facts["tokens_of_plain"]
