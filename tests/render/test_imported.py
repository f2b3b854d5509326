"""The table of an import, and the split that a probe gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.records.imported import Imported, ImportedRow
from grpo_autotune.render.imported import render_imported, split_lines
from grpo_autotune.report.files import load_report

ROOT = Path(__file__).parents[2]
SIX = {"G": 5, "P": 512, "C": 640, "E": 1, "D": 8, "m": 10}


def row(line: int | None, key: str, value: Any, verdict: Any, targets: dict[str, Any], *rest: Any) -> ImportedRow:
    note, file = (*rest, *("", None)[len(rest) :])
    return ImportedRow(line=line, file=file, key=key, value=value, kind=verdict, to=targets, why=note)


NUMBERS = {"grpo.num_generations": 5, "grpo.steps_per_generation": 32}
ROWS = [
    row(3, "algorithm.adv_estimator", "grpo", "same", {}, "TRL's own"),
    row(4, "data.train_batch_size", 512, "converted", NUMBERS, "512 x 5"),
    row(5, "actor_rollout_ref.actor.ppo_mini_batch_size", 128, "converted", NUMBERS, "512 x 5"),
    row(6, "data.max_response_length", 2048, "same", {"grpo.max_completion_length": 2048}),
    row(7, "trainer.logger", ["console"], "none", {}, "the console has no counterpart"),
    row(9, "data.truncation", "left", "changes", {"data.prompt_overflow": "left"}, "images kept", "base.yaml"),
    row(None, "actor_rollout_ref.actor.optim.weight_decay", 0.01, "same", {"grpo.weight_decay": 0.01}),
]  # fmt: skip


def table(width: int) -> str:
    imported = Imported(
        file="run.sh", source="verl", version="2026", version_from="assumed", world_size=8, numbers=SIX,
        steps_per_rollout=4.0, rows=ROWS, warnings=["line 2 cuts the command"], config={},
    )  # fmt: skip
    return render_imported(imported, width)


def test_rows_stand_by_line_and_defaults_apart() -> None:
    text = table(120)
    given, defaults = text.split("Defaults of verl 2026 that had to be written out")
    assert "512 prompts x 5 completions per rollout; optimizer steps of 640 completions, 4 per rollout" in text
    assert "WARNING: line 2 cuts the command" in given
    assert "6  same             data.max_response_length = 2048 -> grpo.max_completion_length\n" in given
    assert "ppo_mini_batch_size = 128 -> as line 4" in given
    assert "base.yaml:9  changes meaning" in given and "images kept" in given
    assert "weight_decay = 0.01 -> grpo.weight_decay" in defaults
    assert "3 same, 2 converted, 1 no equivalent and 1 changes meaning" in defaults
    assert "changes meaning: base.yaml:9" in defaults and "no equivalent: line 7" in defaults


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_value_can_be_read_at_any_width(width: int) -> None:
    text = table(width)
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    assert all(row.key in joined and str(row.why).replace(" ", "") in joined for row in ROWS)


def test_the_split_sums_to_the_training_pass() -> None:
    report = load_report(ROOT / "docs" / "benchmarks" / "demo")
    lines = list(split_lines(report, "verl"))
    assert lines[0].startswith("verl's update_actor holds ") and "was not measured" in lines[1]
    shares = [float(word.rstrip("%")) for word in lines[0].split() if word.endswith("%")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=1.5)
    assert next(split_lines(report, "trl")).startswith("The training pass holds ")
