"""What a search shows while it runs and at its end, and a script as the thing that is searched."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grpo_autotune.cli.main import main
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import TABLE, with_knobs
from grpo_autotune.records.search import SearchProgress
from grpo_autotune.records.trial import Progress, TrialOutcome, TrialSpec
from grpo_autotune.render.search import render_search
from grpo_autotune.render.search_live import SearchView, panel, plain_line
from grpo_autotune.scripts.stand_in import config_of_script, load_stand_in, overrides
from grpo_autotune.search.folder import load_search
from grpo_autotune.search.leaderboard import Leaderboard
from grpo_autotune.search.session import search
from grpo_autotune.search.space import space
from grpo_autotune.search.summary import pareto
from tests.support.paper_machine import MACHINE, Listener, PaperModels, PaperTrials, record_of, user_config
from tests.support.sample_records import demo_record, trainer_facts


def searched(folder: Path, budget_s: float = 300.0, **trials: Any) -> tuple[Any, Listener]:
    paper, view = PaperTrials(folder, **trials), Listener()
    report = search(
        user_config(), budget_s=budget_s, out=None, run_dir=folder, view=view, runner=lambda _: paper,
        fit=lambda *probe: PaperModels(), clock=paper.clock, machine=MACHINE,
    )  # fmt: skip
    return report, view


def test_the_end_tells_gain_split_contributions_pareto_and_files(tmp_path: Path) -> None:
    report, _ = searched(tmp_path, 400.0)
    text = render_search(report, width=200)
    assert f"Raced: x {report.best.speedup:.2f}" in text
    assert " useful completions per second, interval at 90%, " in text and " per step.\n" in text
    assert "useful completions per second" in (tmp_path / "tuned.yaml").read_text()
    for section in ("How the gain comes about", "What changes what is learned", "Speed against reward", "Not run"):
        assert section in text
    assert "from exact knobs" in text and "data.image_size 512 -> 256" in text and "measured" in text
    assert "proven, reward" in text and "predicted to need more than 95% of the memory" in text
    assert str(tmp_path / "tuned.fast.yaml") in text
    assert max(len(line) for line in render_search(report, width=80).splitlines()) <= 80


def test_failures_are_told_by_cause(tmp_path: Path) -> None:
    report, _ = searched(tmp_path)
    failed = report.trials[2].model_copy(update={"status": "hang", "why": "no sign of life for 120 s"})
    text = render_search(report.model_copy(update={"trials": [*report.trials, failed]}))
    assert "hang (1): trial 2; the first: no sign of life" in text


def test_nothing_else_measured_is_not_called_the_best(tmp_path: Path) -> None:
    report, _ = searched(tmp_path, 30.0)
    text = render_search(report, width=200)
    assert "1 timed trial, " in text and "no other trial fits into what is left of the budget" in text
    assert "Your configuration stays: no other was measured; " in text


def test_a_prediction_is_called_one(tmp_path: Path) -> None:
    report, _ = searched(tmp_path, 0.0)
    assert "Predicted: x" in render_search(report)


def test_a_stored_search_prints_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = searched(tmp_path)
    assert load_search(tmp_path) == report
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == render_search(report).strip()
    (tmp_path / "search.json").write_text('{"schema": "other"}')
    assert main(["report", str(tmp_path)]) == 2
    assert "schema" in capsys.readouterr().err


def test_the_live_view_shows_time_trial_best_skipped_and_errors(tmp_path: Path) -> None:
    _, view = searched(tmp_path)
    last = next(state for state in reversed(view.states) if state.progress and state.skipped)
    lines = "\n".join(panel(last))
    assert "left" in lines and "step 1, generation" in lines and "own " in lines and "best    x" in lines
    assert "skipped" in lines and "models  off by" in lines
    assert lines.count(" per step") == 2


def test_without_a_terminal_there_is_a_line_a_trial(tmp_path: Path) -> None:
    _, view = searched(tmp_path)
    out, now = io.StringIO(), [0.0]
    with SearchView(Console(file=out, width=500), lambda: now[0]) as plain:
        for state in view.states:
            plain.show(state)
    said = out.getvalue().splitlines()
    skipped, lines = ([line for line in said if line.startswith("not run: ") is is_one] for is_one in (True, False))
    assert skipped and len(skipped) == len({line.partition(", ")[2] for line in skipped}), "each reason once"
    assert "| models off by 10%" in lines[-1]
    assert len(lines) == len({state.trial.number for state in view.states if state.trial})
    assert lines[0].endswith("| trial 0 (probe): your own configuration")
    told = "\n".join(lines)
    for words in ("(rewards alone): your own configuration", "(worst-case step): ", "(race): "):
        assert words in told
    assert "gradient_checkpointing false" in told and "False" not in told


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("start-up: model", 0, 0), "start-up: model"),
        (Progress("backward", 2, 9), "step 2, the backward pass"),
        (Progress("other", 2, 9), "step 2"),
    ],
)
def test_the_stage_stands_last(progress: Progress, text: str) -> None:
    trial = TrialSpec(number=0, purpose="probe", config={}, knobs={}, limit_s=9.0, hang_s=9.0, steps=1)
    state = SearchProgress(5.0, 9.0, trial, 0, [], progress=progress)
    assert plain_line(state).endswith(f"| trial 0 (probe): your own configuration; {text}")


def test_nothing_shown_is_beaten_by_another_row_of_the_same_learning() -> None:
    """Rewards that were never measured are equal all the same where the same is learned; a group size changes none."""
    config = user_config()
    own = {"data.image_size": 512, "grpo.num_generations": 8, "grpo.gradient_checkpointing": True}
    board = Leaderboard(config, own, record_of(config))

    def add(number: int, step_s: float, gib: int, **changed: Any) -> None:
        knobs = own | {f"{'data' if key == 'image_size' else 'grpo'}.{key}": value for key, value in changed.items()}
        ok = TrialOutcome(number=number, status="ok", record=board.record, step_s=[step_s] * 3, peak_bytes=gib * 2**30)
        board.add(knobs, ok, None)

    add(1, 2.0, 9)
    add(2, 1.0, 5, image_size=256)
    add(3, 1.5, 6, image_size=256, gradient_checkpointing=False)
    add(4, 2.5, 10, num_generations=4)
    assert [row.number for row in pareto(board)] == [2, 1]
    assert [row.reward_difference for row in pareto(board)] == [None, 0.0]


def test_the_rows_of_the_files_are_never_cut_from_the_table(tmp_path: Path) -> None:
    report, _ = searched(tmp_path)
    row = next(row for row in report.pareto if row.changed == report.best.changed)
    faster = [
        row.model_copy(update={"speedup": 9.0 + n, "changed": {"data.image_size": n}, "number": 90 + n})
        for n in range(20)
    ]
    text = render_search(report.model_copy(update={"pareto": [*faster, row]}), width=200)
    assert f"x {row.speedup:.2f}" in text.partition("Speed against reward")[2] and "and 13 more, in" in text
    assert "\n\n\n" not in text


def test_a_script_stands_in_for_a_configuration(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    config = load_stand_in([str(script), "--fast"], ["search.steps=2", "output.dir=there"])
    facts = trainer_facts(gradient_accumulation_steps=8, steps_per_generation=8)
    seen = config_of_script(config, demo_record(trainer=facts, images=None))
    assert seen.batch.micro_batch == 2 and seen.batch.completions_per_step == 16 and seen.search.steps == 2
    found = space(seen, MACHINE, demo_record(trainer=facts, images=None))
    assert set(found.keys) <= {row.key for row in TABLE if row.key.startswith("grpo.")} | {"speedups"}
    knobs = {"grpo.per_device_train_batch_size": 8, "grpo.gradient_checkpointing": True, "speedups": "auto"}
    turned = with_knobs(seen, knobs)
    assert overrides(seen, turned) == {
        "grpo.per_device_train_batch_size": 8,
        "grpo.gradient_accumulation_steps": 2,
        "grpo.gradient_checkpointing": True,
        "speedups": "auto",
    }
    assert overrides(seen, seen) == {}


def test_a_script_brings_its_own_settings(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    with pytest.raises(ConfigError, match="brings its own settings"):
        load_stand_in([str(script)], ["grpo.beta=0"])
    with pytest.raises(ConfigError, match="no such script"):
        load_stand_in(["missing.py"])
