"""`grpo-autotune watch`: a run's state from its files, live, over, or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.commands.watch import read_runs
from grpo_autotune.probe.live import LIVE_FILE, Live, LiveFile
from grpo_autotune.records.search import SearchProgress, Skipped
from grpo_autotune.records.trial import TrialSpec
from grpo_autotune.trials.heartbeat import HeartbeatWriter

ROOT = Path(__file__).parents[2]
SAMPLE = {"rss_bytes": 3.0 * 2**30, "cpu_percent": 99.0}
WRITER = """
import sys, time, pathlib
from grpo_autotune.probe.live import LiveFile
LiveFile(pathlib.Path(sys.argv[1])).starting("model")
print("written", flush=True)
time.sleep(60)
"""


def state(step: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"global_step": step, "max_steps": 80, "log_history": [], **more})


def test_a_training_tells_step_pace_time_left_reward_and_memory(tmp_path: Path, capsys) -> None:
    log = [{"reward": 0.25, "kl": 0.5, "loss": 9.0}, {"eval_reward": 0.75}, {"reward": float("nan"), "kl": 0.125}]
    LiveFile(tmp_path).see(state(12, log_history=log), "generation", [5.0, 1.0, 2.0], SAMPLE)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines == {
        "run": f"{tmp_path}: running",
        "now": "step 13 of 80, generation",
        "pace": "1.50 s per step █▁▃",
        "left": "about 1 min 42 s left",
        "logged": "reward 0.2500, KL 0.1250, held-out reward 0.7500",
        "memory": "3.0 GiB",
    }


def test_the_file_is_written_once_per_second_whatever_is_seen(tmp_path: Path, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    live, seen = LiveFile(tmp_path), []
    for tick in range(25):
        clock[0] = 100.0 + tick / 5
        live.see(state(tick), "reward", [], SAMPLE)
        seen.append(json.loads((tmp_path / LIVE_FILE).read_text())["step"])
    assert [seen.count(step) for step in dict.fromkeys(seen)] == [5, 5, 5, 5, 5]
    live.see(state(24), None, [], None)  # its end is written at once
    assert Live.model_validate_json((tmp_path / LIVE_FILE).read_text()).over


def test_what_a_script_logs_under_a_known_name_need_be_no_number(tmp_path: Path) -> None:
    log = [{"reward": "high", "kl": None, "eval_reward": [0.5]}, {"kl": 0.25}]
    LiveFile(tmp_path).see(state(3, log_history=log), None, [], None)
    assert Live.model_validate_json((tmp_path / LIVE_FILE).read_text()).logged == {"kl": 0.25}


@pytest.mark.parametrize(("total", "words"), [(24, "ended"), (80, "stopped after step 24")])
def test_a_training_that_is_over_is_so_though_its_process_lives(tmp_path: Path, total: int, words: str) -> None:
    live = LiveFile(tmp_path)
    live.total = total
    live.see(state(24), None, [1.0], None)
    (run,) = read_runs(tmp_path)
    assert (run.goes_on, run.state) == (False, words)
    assert "left" not in dict(run.facts)


@pytest.mark.parametrize(("age_s", "words"), [(5, "running"), (300, "no sign of life for 5 min 00 s")])
def test_on_another_machine_only_silence_tells(tmp_path: Path, age_s: int, words: str) -> None:
    (tmp_path / LIVE_FILE).write_text(Live(host="node7", pid=os.getpid(), born_s=0.0, stage="reward").model_dump_json())
    os.utime(tmp_path / LIVE_FILE, (time.time() - age_s,) * 2)
    (run,) = read_runs(tmp_path)
    assert run.goes_on and run.state.startswith(words)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a file to somebody else")
def test_a_process_of_somebody_else_that_is_hidden_here_is_not_called_killed(tmp_path: Path, monkeypatch) -> None:
    LiveFile(tmp_path).write(stage="gener\x1b[31mation", step=2, of=4)
    live = json.loads((tmp_path / LIVE_FILE).read_text())
    (tmp_path / LIVE_FILE).write_text(json.dumps({**live, "pid": 2**22 + 1}))  # no process has it, as seen from here
    assert read_runs(tmp_path)[0].state.startswith("killed, or failed")
    os.chown(tmp_path, 4321, -1)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    (run,) = read_runs(tmp_path)
    assert run.goes_on and run.state == "running"


def test_what_a_file_says_cannot_move_the_cursor(tmp_path: Path, capsys) -> None:
    LiveFile(tmp_path / "a\x1b[2Jb").write(stage="gener\x1b[31mation", step=2, of=4)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a\\x1b[2Jb" in out


def test_a_number_that_another_process_has_by_now_is_no_life(tmp_path: Path) -> None:
    LiveFile(tmp_path).starting("data")
    live = json.loads((tmp_path / LIVE_FILE).read_text())
    (tmp_path / LIVE_FILE).write_text(json.dumps({**live, "born_s": live["born_s"] - 1000.0}))
    (run,) = read_runs(tmp_path)
    assert not run.goes_on and run.state.startswith("killed, or failed")


def test_a_search_shows_what_its_trial_says_and_runs_below_a_folder_are_a_table(tmp_path: Path, capsys) -> None:
    spec = TrialSpec(number=4, config={}, knobs={})
    progress = SearchProgress(
        *(90.0, 180.0, spec, 3, [Skipped(why="slower", count=9, example={})]), changed={"grpo.beta": 0.0},
        baseline_step_s=2.0, best_step_s=1.0, best_changed={"speedups": "auto"}, baseline={"speedups": "none"},
        speedup=1.9, step_error=0.1,
    )  # fmt: skip
    LiveFile(tmp_path / "s" / "search").write(search=progress)
    (tmp_path / "s" / "search" / "trials" / "0004").mkdir(parents=True)
    heartbeat = HeartbeatWriter(tmp_path / "s" / "search" / "trials" / "0004")
    heartbeat.step, heartbeat.of = 2, 3
    heartbeat.beat("backward")
    heartbeat.close()
    shutil.copy(ROOT / "tests" / "stored" / "report.json", tmp_path / "report.json")
    assert main(["watch", str(tmp_path / "s" / "search"), "--once"]) == 0
    out = capsys.readouterr().out
    assert "now     trial 4: beta 0.0; step 2, the backward pass" in out and "best    x 1.90, 1.00 s per step" in out
    assert "Search  1m30s of 3m00s left, 3 trials done" in out and "skipped 9: slower" in out
    LiveFile(tmp_path / "train").starting("model")
    (tmp_path / "report.json").unlink()
    assert main(["watch", str(tmp_path), "--once"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows if "running" in row] == [["s/search", "running"], ["train", "running"]]
    assert "start-up: model" in rows[-1]
    shutil.copy(ROOT / "tests" / "stored" / "search.json", tmp_path / "s" / "search")
    os.utime(tmp_path / "s" / "search" / "search.json", (time.time() + 5,) * 2)
    (run,) = read_runs(tmp_path / "s" / "search")
    assert not run.goes_on and run.state == "ended"
    assert [name for name, _ in run.facts] == ["best"] and "useful completions per second" in run.facts[0][1]


def test_a_run_of_an_older_version_and_a_damaged_state(tmp_path: Path, capsys) -> None:
    (tmp_path / LIVE_FILE).write_text('{"host": "x", "pi')
    assert main(["watch", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and "there is no run here" in error
    shutil.copy(ROOT / "tests" / "stored" / "report.json", tmp_path)
    assert main(["watch", str(tmp_path)]) == 0
    assert ": ended" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_is_told_from_a_live_one_and_ctrl_c_leaves(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        words = [sys.executable, "-m", "grpo_autotune", "watch", str(tmp_path), "--interval", "0.1"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout is not None
            lines = [watcher.stdout.readline() for _ in range(2)]
            watcher.send_signal(signal.SIGINT)
            _, error = watcher.communicate(timeout=10)
        assert lines == [f"{tmp_path} | running | start-up: model\n"] * 2
        assert watcher.returncode == 130 and error == "grpo-autotune: stopped by Ctrl-C\n"
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout is not None and "running" in watcher.stdout.readline()
            writer.kill()
            out, _ = watcher.communicate(timeout=10)
        assert watcher.returncode == 0 and "killed, or failed" in out.splitlines()[-2] + out.splitlines()[-1]
