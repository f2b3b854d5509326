"""`grpo-autotune run` on an unedited script, through real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_autotune.cli.main import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "train_grpo.py"


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "grpo_autotune", "run", *map(str, words)]


def environment(out: Path) -> dict[str, str]:
    return {**os.environ, "OUTPUT_DIR": str(out / "model"), "OMP_NUM_THREADS": "1"}


def run(out: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=out, env=environment(out), capture_output=True, text=True, timeout=240, check=False
    )


def test_steps_ends_the_script_and_json_stands_alone(tiny, tmp_path):
    done = run(tmp_path, "--steps", 2, "--json", "--out", "report", SCRIPT, tiny("llama"), "500")
    assert done.returncode == 0, done.stderr
    assert "the script goes on" not in done.stdout
    assert json.loads(done.stdout) == json.loads((tmp_path / "report" / "report.json").read_text())


def test_the_script_runs_to_its_end_with_what_a_search_found_and_the_breakdown_follows(tiny, tmp_path):
    receipt = {
        "machine": "elsewhere", "hardware": "8 cores", "step_s": 1e-3, "step_s_low": 1e-3, "step_s_high": 1e-3,
        "steps": 4, "baseline_step_s": 2e-3, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1, "raced": True,
        "confidence": 0.9,
    }  # fmt: skip
    found = {"grpo": {"per_device_train_batch_size": 4}, "speedups": ["shared_prefix"], "receipt": receipt}
    (tmp_path / "tuned.yaml").write_text(json.dumps(found))
    done = run(tmp_path, "--with", "tuned.yaml", "--out", "report", SCRIPT, tiny("qwen3"), "13")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("the script goes on after training") < done.stdout.index("generation")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert sum(stage["self_s"] for stage in report["stages"]) == pytest.approx(report["step_s"], abs=1e-6)
    assert {"script", "model", "trainer", "first_generation", "first_update"} <= {
        phase["name"] for phase in report["startup"]
    }
    assert "report/report.json" in done.stderr
    assert report["trainer"]["per_device_train_batch_size"] == 4
    assert "shared_prefix" in report["trainer"]["speedups"]
    assert "warning: this configuration was tuned on another machine (8 cores)" in done.stderr
    assert "more than the 0.001 s of the receipt" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name_or_path: here}", "model"),
        ("grpo: {num_generation: 4}", "grpo.num_generation: GRPOConfig has no such key"),
        ("data: {image_size: large}", "data.image_size: 'large' is not accepted"),
        ("speedups: [shared_prefx]", "shared_prefx"),
        ("speedups: 3", "speedups"),
        ("receipt: {step_s: 1.0}", "receipt.machine: this key is required"),
        ("- 1", "tuned.yaml"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.yaml").write_text(text)
    assert main(["run", "--with", "tuned.yaml", str(SCRIPT), "model"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_script_keeps_the_errors_of_its_own_values_beside_ours(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "from trl import GRPOConfig\n"
        "cpu = {'output_dir': 'out', 'use_cpu': True, 'bf16': False}\n"
        "try:\n"
        "    GRPOConfig(num_generations=3, per_device_train_batch_size=2, **cpu)\n"
        "except ValueError:\n"
        "    print('rate', GRPOConfig(num_generations=2, per_device_train_batch_size=2, **cpu).learning_rate)\n"
    )
    (tmp_path / "tuned.yaml").write_text("grpo: {learning_rate: 0.125}")
    done = run(tmp_path, "--with", tmp_path / "tuned.yaml", script)
    assert done.returncode == 0 and "rate 0.125" in done.stdout, done.stderr


def test_a_failing_script_keeps_its_traceback_and_its_exit_code(tiny, tmp_path):
    done = run(tmp_path, SCRIPT, tiny("qwen3"), "3", "--fail")
    assert done.returncode == 1
    assert "RuntimeError: the judge is down" in done.stderr
    assert "no optimizer step was finished" in done.stderr


def test_sigterm_still_prints_the_breakdown(tiny, tmp_path):
    process = subprocess.Popen(
        command("--out", "report", SCRIPT, tiny("qwen3"), "100000"),
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    spans = tmp_path / "report" / "spans.jsonl"
    deadline = time.monotonic() + 120
    while not (spans.exists() and len(spans.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "generation" in out and (tmp_path / "report" / "report.json").exists()


@pytest.mark.slow
def test_a_missing_script_is_one_line(tmp_path):
    done = run(tmp_path, "nowhere.py")
    assert done.returncode == 2
    assert done.stderr.startswith("grpo-autotune: nowhere.py: no such script") and "Traceback" not in done.stderr


def test_two_ranks_are_measured_and_the_straggler_is_named(tiny, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    words = ["-m", "grpo_autotune", "run", "--out", "report", SCRIPT, tiny("qwen3"), "4", "--straggler"]
    done = subprocess.run(
        [*launch, *map(str, words)],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    stages = {row["name"]: row for row in report["ranks"]["stages"]}
    assert report["ranks"]["world_size"] == 2
    assert stages["sync_wait"]["slowest_rank"] == 0 and stages["sync_wait"]["slowest_s"] > 0.3
    assert stages["reward"]["slowest_rank"] == 1 and stages["reward"]["slowest_s"] > 0.4
    assert [(row["rank"], row["stage"]) for row in report["ranks"]["stragglers"]] == [(1, "reward")]
    assert (tmp_path / "report" / "spans.rank1.jsonl").exists()
    assert done.stdout.count("the script goes on after training") == 2
    assert "rank 1" in done.stdout
