"""The command line through real processes: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

REWARD = """
import os
def talkative(completions, **kwargs):
    print("debug from a reward")
    return [float(len(c[0]["content"]) % 2) for c in completions]
def down_on_rank_1(completions, **kwargs):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("the judge is down")
    return [0.5] * len(completions)
"""


@pytest.fixture
def here(tiny, tmp_path) -> Path:
    rows = [{"question": f"What is {i} plus three?", "answer": str(i + 3)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "judges.py").write_text(REWARD)
    config = {
        "model": {"name_or_path": str(tiny("qwen3"))},
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"path": "rows.jsonl", "columns": {"prompt": "question"}},
        "rewards": [{"name": "judges:talkative"}],
        "speedups": "none",
        "grpo": {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "max_steps": 500},
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def cli(folder: Path, *words: object, launch: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launch, "-m", "grpo_autotune", *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def test_json_stands_alone_beside_a_talkative_reward_and_report_prints_it_again(here):
    done = cli(here, "probe", "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "debug from a reward" in done.stderr
    assert found == json.loads((here / "runs" / "grpo" / "probe" / "report.json").read_text())
    again = cli(here, "report", "runs/grpo/probe", "--json")
    assert json.loads(again.stdout) == found


def test_ctrl_c_in_a_probe_reports_what_was_measured(here):
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_autotune", "probe", "--steps", "400"],
        cwd=here, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    spans = here / "runs" / "grpo" / "probe" / "spans.jsonl"
    deadline = time.monotonic() + 120
    while not (spans.exists() and len(spans.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "stopped by Ctrl-C" in err and "generation" in out and "Traceback" not in err


def test_a_failure_on_another_rank_than_the_first_is_told(here):
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617")
    words = ("probe", "--steps", 1, "--set", "rewards=[{name: 'judges:down_on_rank_1'}]")
    done = cli(here, *words, "--set", "grpo.use_cpu=true", launch=launch)
    assert done.returncode != 0
    assert "rank 1: grpo-autotune:" in done.stderr and "the judge is down" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["probe", "--set", "grpo.num_generation=2"], 2, "num_generations"),
        (["probe", "--set", "grpo.num_generations=3"], 2, "num_generations"),
        (["train", "--set", "model.name_or_path=/nowhere/model"], 2, "/nowhere/model"),
        (["probe", "--set", "data.columns={prompt: nothing}"], 2, "nothing"),
        (["report", "nowhere"], 2, "nowhere"),
        (["probe", "no-such-profile"], 2, "no-such-profile"),
        (["probe", "--stepz", "3"], 2, "--stepz"),
        (["probe", "--steps", "0"], 2, "'--steps': Input should be greater than or equal to 1. See `"),
        (["report"], 2, "Missing argument 'RUN_DIR'. See `grpo-autotune report --help`."),
        (["serch"], 2, "No such command 'serch'. Did you mean 'search', 'serve'? See `grpo-autotune --help`."),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(here, words, code, told):
    done = cli(here, *words)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and last.startswith("grpo-autotune: ") and told in last
    assert "Traceback" not in done.stderr and done.stdout == ""
