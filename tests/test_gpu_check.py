"""`benchmarks.gpu_check` on a CPU: its stages on tiny models, and what it says where one fails or takes the process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import stages
from benchmarks.gpu.bench import Bench, Outcome, OutOfTime, deadline
from grpo_autotune.hardware.device_memory import ALLOCATOR, DEVICE_MEMORY, EXPANDABLE


def started(monkeypatch: pytest.MonkeyPatch, out: Path, *names: str, run: Any) -> int:
    """The command with its child replaced by `run(options, stages, scratch, limit)`."""
    words = ["--out", str(out), "--device", "cpu", "--tiny", "--stages", *names]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
    monkeypatch.setattr(gpu_check, "run_child", run)
    return gpu_check.main()


def here(options: argparse.Namespace, names: list[str], scratch: Path, limit_s: float) -> None:
    """The child's stages in this process."""
    given = argparse.Namespace(**{**vars(options), "scratch": scratch})
    for name in names:
        assert stages.run(name, given, time.monotonic() + limit_s)


@pytest.mark.slow
@pytest.mark.long
def test_every_stage_that_needs_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("environment", "correctness", "attention", "steps", "decode", "memory", "probe_cost")
    code = started(monkeypatch, tmp_path, *names, run=here)
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: stage["error"] for name, stage in told["stages"].items()} == dict.fromkeys(names)
    assert [row for row in told["rows"] if row["ok"] is False] == []
    assert {row["stage"] for row in told["rows"]} == set(names) and code == 0
    exact = {row["name"]: row["measured"] for row in told["rows"] if row["stage"] == "correctness"}
    assert 0.0 < exact["qwen3_vl, auto"] < 1e-5
    assert "speed-ups: step, plain over this" in capsys.readouterr().out
    assert list(tmp_path.glob("spans-plain/spans.jsonl"))


def test_a_stage_that_takes_its_process_along_is_a_line_and_the_rest_runs_in_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes: list[list[str]] = []

    def child(options: argparse.Namespace, names: list[str], scratch: Path, limit_s: float) -> None:
        processes.append(names)
        outcome = Outcome.of(options.out)
        for name in names:
            outcome.begin(name)
            if name == "attention":
                return
            outcome.close(name, 1.0, None)

    assert started(monkeypatch, tmp_path, "environment", "attention", "steps", run=child) == 1
    assert processes == [["environment", "attention", "steps"], ["steps"]]
    told = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert told["environment"]["error"] is None and told["steps"]["error"] is None
    assert "its process ended" in told["attention"]["error"]
    assert "check.log" in capsys.readouterr().out


def test_an_error_is_a_row_with_its_traceback_and_the_stage_goes_on(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    with bench.part("first"):
        raise RuntimeError("no kernel image")
    bench.row("second", float("nan"), "s", predicted=(1.0, 2.0), ok=True)
    first, second = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert first["ok"] is False and "RuntimeError: no kernel image" in first["note"]
    assert second["measured"] == "nan" and second["predicted"] == [1.0, 2.0]


def test_a_stage_ends_at_its_deadline_whatever_it_catches(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    with pytest.raises(OutOfTime), deadline(0.1), bench.part("slow"):
        time.sleep(30.0)
    assert not bench.outcome.content["rows"]


def test_stages_run_with_the_allocator_of_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr("subprocess.run", lambda words, env, **more: given.update(env))
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    gpu_check.run_child(argparse.Namespace(out=tmp_path, device="cuda", tiny=False), ["steps"], tmp_path, 1.0)
    assert given[ALLOCATOR[0]] == EXPANDABLE


def test_a_run_s_memory_is_not_that_of_the_runs_before_it(tmp_path: Path) -> None:
    from benchmarks.gpu.memory import allocated

    DEVICE_MEMORY.reserved_bytes = 7
    assert allocated(bench_in(tmp_path)) == 0 == DEVICE_MEMORY.facts()["reserved_bytes"]


def bench_in(folder: Path) -> Bench:
    """A bench on the CPU with time left."""
    until = time.monotonic() + 60.0
    return Bench("stage", Outcome.of(folder), device="cpu", tiny=True, out=folder, scratch=folder, until=until)
