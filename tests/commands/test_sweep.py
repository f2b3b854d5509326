"""Rewards over a network as `probe` sees them: alone at more and more calls at once, and in a run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.commands.probe import probe_config
from grpo_autotune.records.report import Report
from grpo_autotune.render.terminal import render
from tests.support.fault_server import FaultServer
from tests.support.training import text_config


def served(server: FaultServer, folder: Path) -> Path:
    """A configuration of which a step asks a server for 32 scores, with three rows of data."""
    rows = [{"prompt": f"How many are {n} and one?", "answer": f"{n + 1}.", "value": n} for n in range(3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": {"random_init": "qwen3-0.6b"},
        "data": {"path": str(folder / "rows.jsonl")},
        "rewards": [
            {"name": "exact_match"},
            {
                "name": "service",
                "params": {"url": server.url, "body": {"value": "{{ value }}", "text": "{{ completion }}"}},
            },
        ],
        "grpo": {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "num_generations": 8,
            "max_steps": 5,
        },
    }
    (folder / "grpo.yaml").write_text(json.dumps(config))
    return folder / "grpo.yaml"


def swept(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["probe", *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "grpo-autotune/rewards/1" and document["source"].startswith("column answer of ")
    return document["settings"]


def test_a_judge_of_one_branch_is_asked_about_its_rows_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultServer() as server:
        path = served(server, tmp_path)
        rows = [
            json.loads(line) | {"task": "ab"[n % 2]}
            for n, line in enumerate((tmp_path / "rows.jsonl").read_text().splitlines())
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        beside = {"a": {"beta": 0.1, "rewards": ["exact_match"]}, "b": {"beta": 0.1, "rewards": ["service"]}}
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "branches": {"column": "task", **beside}}))
        settings = swept(capsys, str(path), "--rewards-only")
        assert {call.body["value"] for call in server.calls} == {1}
        assert settings[0]["rows"] == 8


def test_calls_at_once_go_up_until_the_first_429(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultServer(delay_s=0.02) as server:
        server.script = lambda number: "429" if sum(call.end_s is None for call in server.calls) >= 5 else "ok"
        settings = swept(capsys, str(served(server, tmp_path)), "--rewards-only")
        assert server.connections() == 0
    assert [one["concurrency"] for one in settings] == [1, 2, 4, 8]
    assert [one["rows"] for one in settings] == [8, 8, 16, 32]
    assert [bool(one["rate_limited"]) for one in settings] == [False, False, False, True]
    assert settings[0]["step_s"] > 1.5 * settings[1]["step_s"] > 2.0 * settings[2]["step_s"] >= 8 * 2.0 * 0.02
    assert {call.body["text"] for call in server.calls} == {"1.", "2.", "3."}, "the data's own answers"


def test_recorded_completions_are_scored_before_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Why?", "completion": "Because.", "answer": "No.", "value": 1}))
    with FaultServer() as server:
        config = str(served(server, tmp_path))
        assert main(["probe", config, "--rewards-only", "--set", f"data.path={texts}"]) == 0
        assert {call.body["text"] for call in server.calls} == {"Because."}
        printed = capsys.readouterr().out
        assert f"column completion of {texts}" in printed and "calls at once" in printed and "predicted step" in printed
        texts.write_text(json.dumps({"prompt": "Why?", "value": 1}))
        assert main(["probe", config, "--rewards-only", "--set", f"data.path={texts}"]) == 2
        assert "the data has no column completion, answer or solution" in capsys.readouterr().err
        assert main(["probe", config, "--rewards-only", "--set", "rewards=[{name: exact_match}]"]) == 2
        assert "rewards: none is a judge or a service" in capsys.readouterr().err


@pytest.mark.slow
def test_a_probe_tells_what_a_service_takes(tiny: Any, tmp_path: Path) -> None:
    shown: list[Report] = []
    with FaultServer(answer=lambda call: {"score": len(call.body["completion"]) % 7}, delay_s=0.2) as server:
        service = {"name": "service", "label": "scorer", "concurrency": 4, "params": {"url": server.url}}
        rewards = [{"name": "tests.support.training:uneven"}, service]
        config = text_config(tiny("qwen3"), tmp_path, {"rewards": rewards})
        probe_config(config, steps=2, out_dir=tmp_path / "probe", output=nullcontext(), show=shown.append)
        asked = len(server.calls)
    (report,) = shown
    (one,) = report.remote
    assert (one.name, one.kind, one.place, one.concurrency) == ("scorer", "service", 1, 4)
    assert (one.batches, one.rows, one.calls) == (2, 16, 16), "the warm-up step and the first calls are left out"
    assert asked == 2 + 8 + 16
    assert one.call_s and one.call_s.p50 >= 0.2 and one.wait_s and one.wait_s.p95 >= 0.2, "the second round of four"
    assert 0.4 <= one.batch_s / 2 <= report.stage("reward").self_s * 1.5
    phases = [phase.name for phase in report.startup]
    assert phases.index("trainer") < phases.index("scorer") < phases.index("first_generation")
    text = render(report)
    assert "The step waits" in text and "scorer" in text and "Set rewards.1.concurrency to 8 (now 4)" in text
