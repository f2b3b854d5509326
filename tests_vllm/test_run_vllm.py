"""Real processes: an unedited TRL script with a colocated engine under `grpo-autotune run`, a YAML under `probe`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

def length(completions, **kwargs):
    return [len(completion[0]["content"]) % 7 / 6 for completion in completions]

rows = [{"prompt": [{"role": "user", "content": f"What is {row} plus three?"}]} for row in range(4)]
config = GRPOConfig(
    output_dir=sys.argv[2], use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256, max_steps=20,
    num_generations=2, per_device_train_batch_size=2, max_completion_length=6, use_cpu=True, bf16=False,
    report_to="none",
)
trainer = GRPOTrainer(model=sys.argv[1], reward_funcs=length, args=config, train_dataset=Dataset.from_list(rows))
engine = trainer.vllm_generation.llm.llm_engine.vllm_config
with open(sys.argv[3], "w") as seen:
    print(engine.scheduler_config.max_num_seqs, engine.model_config.dtype, file=seen)
trainer.train()
"""

CONFIG = """
model: {name_or_path: MODEL, dtype: bfloat16}
peft: {r: 2, target_modules: [q_proj, v_proj]}
data: {path: ROWS, columns: {prompt: question, answer: answer}}
rewards: [{name: numeric_match}, {name: length, params: {max_tokens: 8, target_tokens: 3}}]
grpo: {use_vllm: true, max_steps: 8, num_generations: 2, per_device_train_batch_size: 2, max_completion_length: 6,
  use_cpu: true, bf16: false}
vllm: {mode: colocate, max_model_len: 256}
"""


def autotune(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Run one command with its report in `cwd / report`; the report."""
    verb, *others = arguments
    command = [sys.executable, "-m", "grpo_autotune", verb, "--out", str(cwd / "report"), *others]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((cwd / "report" / "report.json").read_text())
    return report


def seconds(report: dict[str, Any]) -> dict[str, float]:
    return {stage["name"]: stage["self_s"] for stage in report["stages"]}


def test_unedited_script(served: Callable[[str], Path], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(script), str(served("qwen3")), str(tmp_path / "out"), str(tmp_path / "seen")]
    values = tmp_path / "values.yaml"
    values.write_text("vllm: {max_num_seqs: 3}")
    report = autotune("run", "--steps", "3", "--with", str(values), *arguments, cwd=tmp_path)
    assert (tmp_path / "seen").read_text() == "3 torch.float32\n"
    assert all(seconds(report)[name] > 0 for name in ("generation", "weight_sync", "policy_logprob", "backward"))
    assert sum(seconds(report).values()) == pytest.approx(report["step_s"], abs=1e-6)
    assert report["fidelity"]["tokens"] > 0
    assert {phase["name"] for phase in report["startup"]} >= {"engine"}


def test_configuration(served: Callable[[str], Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"question": f"{row} plus three?", "answer": str(row + 3)}) for row in range(8))
    )
    config = tmp_path / "grpo.yaml"
    config.write_text(CONFIG.replace("MODEL", str(served("qwen3"))).replace("ROWS", str(rows)))
    report = autotune("probe", "--steps", "2", cwd=tmp_path)
    assert all(seconds(report)[name] > 0 for name in ("generation", "weight_sync", "policy_logprob", "backward"))
    assert report["fidelity"]["ok"]
    assert {phase["name"] for phase in report["startup"]} >= {"engine"}
