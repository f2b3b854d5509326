"""A TRL that nobody has tried: what is there works, with one warning, and what is gone is named."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trl

from grpo_autotune.hardware import versions
from grpo_autotune.hardware.machine import package_version
from grpo_autotune.probe.probe import Probe
from grpo_autotune.seams import table
from grpo_autotune.train.trainer import run_training
from tests.support.trainers import make_trainer
from tests.support.training import text_config

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
RENAMED = ("_calculate_rewards", "_score_completions")


def test_a_newer_one_trains_with_one_warning(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "package_version", lambda name: "1.99.0" if name == "trl" else package_version(name))
    versions.tell_untried.cache_clear()
    config = text_config(tiny("qwen3"), tmp_path, {"speedups": "auto"}, max_steps=2)
    assert run_training(config, tmp_path / "out", prepare=Probe).steps == 2
    told = capsys.readouterr().err
    assert told.count("warning:") == told.count("trl 1.99.0 is newer than what was tried (to 1.16.0)") == 1
    assert "speed-up shared_prefix" in told and "length_sort" in told
    (line,) = [line for line in told.splitlines() if line.startswith("speed-up length_sort")]
    assert "off  TRL 1.99.0 is none of those that speed-ups were held against" in line


@pytest.mark.parametrize("key", ["score", "logps", "loss", "rollout", "tokenize", "rewards", "backward", "pad"])
def test_a_seam_that_is_gone_costs_its_stage_alone(
    key: str, tiny: Tiny, tmp_path: Path, text_rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [row._replace(attribute="gone") if row.key == key else row for row in table.TABLE]
    monkeypatch.setattr(table, "TABLE", tuple(rows))
    monkeypatch.setattr("grpo_autotune.probe.layers.TABLE", tuple(rows))
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=1)
    probe = Probe(trainer, warmup=0)
    trainer.train()
    timings = probe.record().timings
    parts = {row.name: sum(row.per_step_s) for row in timings.stages}
    assert math.isclose(math.fsum(parts.values()), math.fsum(timings.step_s), rel_tol=1e-9)
    assert f"stage `{table.find(key).stage or 'step'}` is measured at" in capsys.readouterr().err
    assert sum(seconds > 0 for seconds in parts.values()) > 6
    if key == "backward":
        assert parts["backward"] == 0.0
    probe.detach()


@pytest.mark.long
def test_a_copy_with_a_renamed_method_is_probed_and_trained_with(tiny: Tiny, tmp_path: Path) -> None:
    package = Path(trl.__file__).parent
    wheel = tmp_path / "wheel"
    shutil.copytree(package, wheel / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    (wheel / "trl-1.17.0.dist-info").mkdir()
    (wheel / "trl-1.17.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.17.0\n")
    module = wheel / "trl" / "trainer" / "grpo_trainer.py"
    module.write_text(module.read_text().replace(*RENAMED))
    yaml = tmp_path / "run.yaml"
    yaml.write_text(text_config(tiny("qwen3"), tmp_path, {"speedups": "auto"}, max_steps=2, beta=0.0).to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "grpo_autotune", "train", str(yaml), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(wheel), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert [line for line in warnings if "trl 1.17.0 is newer than what was tried" in line] == warnings[:1]
    assert any("stage `reward` is measured at" in line and "_calculate_rewards" in line for line in warnings[1:])
    off = [line for line in done.stderr.splitlines() if line.startswith("speed-up skip_dead")]
    assert "off" in off[0] and "_calculate_rewards" in off[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["step_s"] > 0
