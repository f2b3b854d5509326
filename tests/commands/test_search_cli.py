"""The command with real trials: a whole search, and one that is killed, resumed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_autotune.config.schema import load_config
from grpo_autotune.records.search import SearchReport
from tests.support.training import text_config

ROOT = Path(__file__).parents[2]
SECTION = {
    "knobs": {
        "grpo.per_device_train_batch_size": [1, 4],
        "grpo.gradient_checkpointing": [True, False],
        "grpo.num_generations": None,
        "model.attn_implementation": None,
        "grpo.dataloader_num_workers": None,
        "speedups": None,
    },
    "steps": 2,
}


@pytest.fixture
def config(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A configuration with two habits that cost time."""
    grpo = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    found = text_config(tiny("llama"), tmp_path, {"search": SECTION}, **grpo)
    path = tmp_path / "slow.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    return path


def begin(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grpo_autotune", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*words: object) -> tuple[int, str, str]:
    process = begin(*words)
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a file is there; fails with what the process said where it ended first."""
    while not path.exists():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)


def workers_of(folder: Path) -> list[int]:
    """Processes that have a file of the folder open, or name it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            names = [file.path for file in process.open_files()] if "grpo_autotune" in words else []
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(folder) in name for name in [words, *names]):
            found.append(process.pid)
    return found


def gone(folder: Path) -> bool:
    """Whether every process of the folder ends."""
    return any(not workers_of(folder) or time.sleep(0.1) for _ in range(200))


def test_from_a_budget_to_a_configuration_that_loads(config: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "best.yaml"
    code, text, error = run("search", config, "--budget", "4m", "--run-dir", folder, "--out", out, "--json")
    assert code == 0, error
    report = SearchReport.model_validate_json(text)
    assert report == SearchReport.model_validate_json((folder / "search.json").read_text())
    assert report.ended == "exhausted" and report.elapsed_s < 240.0
    assert report.best.changed["grpo.per_device_train_batch_size"] == 4
    assert report.best.raced and report.best.ci[0] > 1.0 and report.best.worst_case == "passed"
    assert {row.status for row in report.trials} == {"ok"}
    tuned = load_config(out)
    assert tuned.batch.micro_batch == 4 and tuned.batch.completions_per_step == 8
    assert tuned.receipt is not None and tuned.receipt.speedup == report.best.speedup
    assert report.model_error["step"].n >= 2
    assert gone(folder)

    code, text, _ = run("report", folder)
    assert code == 0
    assert "Raced: x" in text and "grpo.per_device_train_batch_size 1 -> 4" in text and "tuned.yaml" in text
    assert run("search", config, "--budget", "1m", "--run-dir", folder)[0] == 2


def test_killed_torn_resumed_and_stopped(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin("search", config, "--budget", "10m", "--run-dir", folder)
    wait_for(folder / "trials" / "0001" / "outcome.json", first)
    code, _, error = run("search", config, "--budget", "10m", "--run-dir", folder)
    assert code == 2 and "another search is running in this folder" in error
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert gone(folder), "a worker outlived its parent"
    kept = {name: (folder / "trials" / name / "outcome.json").stat().st_mtime_ns for name in ("0000", "0001")}
    with (folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')

    number = len(list((folder / "trials").iterdir()))
    second = begin("search", config, "--budget", "10m", "--run-dir", folder, "--resume")
    wait_for(folder / "trials" / f"{number:04d}" / "heartbeat", second)
    second.send_signal(signal.SIGTERM)
    out, error = second.communicate(timeout=60)
    assert second.returncode == 143, error
    assert "stopped by SIGTERM" in " ".join(out.split())
    assert gone(folder)
    report = json.loads((folder / "search.json").read_text())
    assert report["ended"] == "interrupted"
    measured = [row["knobs"] for row in report["trials"] if row["purpose"] == "timed" and row["status"] == "ok"]
    assert len(measured) == len({json.dumps(knobs, sort_keys=True) for knobs in measured})
    for name, changed in kept.items():
        assert (folder / "trials" / name / "outcome.json").stat().st_mtime_ns == changed
    assert load_config(folder / "tuned.exact.yaml").receipt is not None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--budget", "2s"), 2, "a budget of 2s is too small: the probe of your configuration was in"),
        (("--budget", "soon"), 2, "'soon' is not a length of time"),
        (("--set", "search.knobs={grpo.num_generation: [2]}"), 2, "Nearest: grpo.num_generations"),
        (("--storage", "postgresql://nobody@127.0.0.1:1/none", "--budget", "60s"), 2, "does not answer"),
        (("--script", "missing.py"), 2, "no such script"),
    ],
)
def test_mistakes_are_one_line(config: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    source: tuple[Any, ...] = () if "--script" in words else (config,)
    found, _, error = run("search", *source, *words, "--run-dir", tmp_path / "run")
    assert found == code and said in error
    assert "Traceback" not in error
