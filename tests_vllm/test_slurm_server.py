"""`examples/slurm/server.sh` on a real Slurm of three nodes: a vLLM server on one, an adapter trained on two others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_autotune.runs.checkpoints import survey
from tests.cluster.test_slurm import LATE, ON_A_CPU, steps
from tests.support import slurm
from tests.support.training import log_lines, text_config
from tests.support.trials import marked, wait_until_none
from tests_vllm.conftest import ENV_FOLDER

ROOT = Path(__file__).parents[1]
LIMIT_S = 300.0
EXACT = 1e-4
"""Nats, in float32."""


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(slurm.wanting() is not None, reason=str(slurm.wanting()))
def test_two_nodes_train_against_the_server_of_a_third(
    served: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"vllm": {"max_model_len": 512}, "rewards": [{"name": "late_rewards:late"}]}
    config = text_config(served("qwen3"), tmp_path, changes, use_vllm=True, max_steps=6, save_steps=100)
    (tmp_path / "late_rewards.py").write_text(LATE, encoding="utf-8")
    values: dict[str, Any] = {**config.to_dict(), "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ENV_FOLDER}:{tmp_path}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{slurm.path()}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    with marked(monkeypatch) as mark, slurm.slurm(tmp_path / "slurm", more=["127.0.0.1"]) as own:

        def begin(name: str) -> tuple[str, Path, Path]:
            output, script = tmp_path / f"{name}.txt", str(ROOT / "examples" / "slurm" / "server.sh")
            return own.submit(*ON_A_CPU, script, "grpo.yaml", name, output=output), tmp_path / name, output

        number, run, output = begin("stopped")
        own.until(lambda: steps(run) >= 2, LIMIT_S)
        own.ask("scancel", "--signal=USR1", number)
        own.until(lambda: own.job(number)["Restarts"] == "1", LIMIT_S)
        own.ask("scancel", number)
        said = output.read_text()
        assert said.count("Exited with exit code 138") == 2, said
        assert said.index("stopped after step") < said.index("SIGTERM: the server shuts down"), said
        assert [(one.step, one.flaw) for one in survey(run / "checkpoints")] == [(steps(run), None)]

        number, run, output = begin("whole")
        assert own.ended(number, LIMIT_S)["JobState"] == "COMPLETED", output.read_text()
        key = "sampling/sampling_logp_difference/max"
        apart = [line[key] for line in log_lines(run) if key in line]
        assert len(apart) == 6 and max(apart) < EXACT, "each step's adapter has reached the server"
        assert (run / "model" / "adapter_model.safetensors").is_file()
    assert not wait_until_none(mark), "the server ends with the job"
