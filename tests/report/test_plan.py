"""The plan of a run: its sums hold, a report tells as much as its record, and what cannot be planned is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.advice import observed
from grpo_autotune.advice.facts import Facts
from grpo_autotune.advice.judge import judge
from grpo_autotune.cli.main import main
from grpo_autotune.commands.plan import basis_of_run, record_of, write_phases
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import knobs_of, with_knobs
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import steps_per_pass
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.plan import Plan
from grpo_autotune.records.probe import ProbeRecord, StageRow
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.render.plan import render_plan
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import save_report
from grpo_autotune.report.plan import Basis, plan_of
from grpo_autotune.search.comparable import faster
from tests.support.sample_records import CPU_MACHINE, config_of, demo_record, trainer_facts

NOW = datetime(2026, 1, 1)
EVALUATES = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 8, "num_generations_eval": 1}
HELD_OUT = {"eval_split": "test"}


def basis(record: ProbeRecord | None = None, once: dict[str, float] | None = None, **sections: Any) -> Basis:
    record = record or demo_record(trainer=trainer_facts(train_rows=500, held_out_rows=64))
    config = config_of(record, **sections)
    return Basis(Models.from_probe(config, record, CPU_MACHINE), "there", once or {})


def evaluating(once: dict[str, float] | None = None, **grpo: Any) -> Basis:
    return basis(once=once, grpo={**EVALUATES, **grpo}, data=HELD_OUT)


def test_the_run_is_the_sum_of_its_parts() -> None:
    plan = plan_of(evaluating({"evaluate": 30.0, "save": 4.0}, save_steps=40, eval_on_start=True), NOW)
    assert (plan.samples, plan.steps) == (200, 100)  # 2 prompts in each of 100 steps
    assert plan.step_s.value == pytest.approx(5.04) and plan.sample_s.value == pytest.approx(2.52)
    evaluation, saving = plan.occasions
    assert (evaluation.every, evaluation.times, saving.every, saving.times) == (10, 11, 40, 3)  # one at the end
    whole_s = 17.3 + 100 * 5.04 + 11 * 30.0 + 3 * 4.0
    assert plan.total_s.value == pytest.approx(whole_s) and plan.total_s.how == "predicted"
    assert evaluation.share == pytest.approx(330.0 / whole_s) and evaluation.once_s.how == "measured"
    assert [(row.every, row.times) for row in plan.cadences] == [(10, 11), (20, 6), (50, 3), (0, 0)]
    assert plan.cadences[-1].total_s.value == pytest.approx(whole_s - 330.0) and plan.cadences[-1].share == 0.0
    figures = [plan.step_s, plan.total_s, *(row.sample_s for rows in plan.tables.values() for row in rows)]
    assert all(0.0 < figure.low < figure.value < figure.high for figure in figures)
    assert plan.ends[1] == "2026-01-01 00:14" and plan.ends[0] < plan.ends[1] < plan.ends[2]


def test_the_length_is_the_users_or_the_configurations() -> None:
    assert plan_of(replace(basis(), samples=999), NOW).steps == 500
    epochs = basis(grpo={"max_steps": -1, "num_train_epochs": 3})
    assert plan_of(epochs, NOW).samples == 1500
    odd = basis(grpo={"max_steps": 81, "num_iterations": 2})
    assert (plan_of(odd, NOW).steps, plan_of(odd, NOW).samples) == (81, 81)  # each step trains half a generation
    unknown = basis(demo_record(), grpo={"max_steps": -1})
    with pytest.raises(ConfigError, match=r"how many rows.*--samples"):
        plan_of(unknown, NOW)


@pytest.mark.parametrize(
    ("grpo", "evaluate", "save"),
    [
        ({"eval_steps": 30, "save_strategy": "no"}, (30, 4), None),  # 30, 60, 90 and the end
        ({"eval_steps": 0.3, "save_steps": 0.5, "eval_on_start": True}, (30, 5), (50, 2)),
        ({"eval_steps": 30, "eval_delay": 45, "save_steps": 500}, (30, 3), (500, 1)),
        ({"eval_steps": 30, "eval_delay": 101, "save_strategy": "best"}, (30, 0), (30, 4)),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, (62, 2), (62, 2)),  # 125 rows, 2 prompts a step
        ({"eval_steps": None, "logging_steps": 25, "save_strategy": "no"}, (25, 4), None),
        ({"eval_strategy": "no", "save_strategy": "no"}, None, None),
    ],
)
def test_occasions_are_counted_as_the_trainer_has_them(
    grpo: dict[str, Any], evaluate: tuple[int, int] | None, save: tuple[int, int] | None
) -> None:
    record = demo_record(trainer=trainer_facts(train_rows=125, held_out_rows=64))
    occasions = plan_of(basis(record, grpo={**EVALUATES, **grpo}, data=HELD_OUT), NOW).occasions
    seen = {row.name: (row.every, row.times) for row in occasions}
    assert (seen.get("evaluate"), seen.get("save")) == (evaluate, save)


def test_a_pass_over_the_data_is_counted_as_by_the_trainer() -> None:
    grpo = {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "num_iterations": 2, "num_generations": 8}
    config = config_of(demo_record(), grpo={"per_device_train_batch_size": 8, **grpo})
    assert steps_per_pass(config, 21) == 14  # 10 generations of 2 prompts, each of 4 micro steps, 3 a step


def test_an_evaluation_is_predicted_as_a_step_that_learns_nothing() -> None:
    trainer = trainer_facts(
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        train_rows=500,
        held_out_rows=2,
    )
    eight = {**EVALUATES, "per_device_eval_batch_size": 16, "num_generations_eval": 8}
    one = basis(demo_record(trainer=trainer), grpo=eight, data=HELD_OUT)
    stages = one.models.stages_s(one.models.base)
    learning = sum(stages.pop(name).value for name in ("backward", "optimizer", "log_save_eval"))
    once = plan_of(one, NOW).occasions[0].once_s
    assert learning > 1.0 and once.how == "predicted"
    assert once.value == pytest.approx(sum(stage.value for stage in stages.values()), rel=0.02)
    assert one.models.evaluation_s(one.models.base, 20).value == pytest.approx(10.0 * once.value, rel=0.05)
    untold = basis(demo_record(), grpo=EVALUATES, data=HELD_OUT)
    assert "not counted" in plan_of(untold, NOW).notes[0]


def test_tables_hold_what_differs() -> None:
    plan = plan_of(basis(), NOW)
    now, *images = plan.tables["image size"]
    assert (now.name, now.speed, now.sample_s.how) == ("384 px (now)", pytest.approx(1.0), "measured")
    assert images and all(row.speed > 1.0 and row.sample_s.how == "predicted" for row in images)
    assert all(row.image_tokens and row.image_tokens < 144.0 for row in images)  # none is enlarged
    models, config = basis().models, basis().models.base
    prompts = [models.stages_s(one)["prompt"].value for one in (config, with_knobs(config, {"data.image_size": 192}))]
    assert 0.25 < prompts[1] / prompts[0] < 0.6  # a quarter of the pixels, and what an image costs at any size
    shrunk = plan_of(basis(data={"image_size": 512}), NOW).tables["image size"]
    assert [row.name for row in shrunk] == ["512 px (now)", "384 px", "768 px", "1024 px"]
    groups = {row.name: row for row in plan.tables["num_generations"]}
    assert groups["16"].knobs == {"grpo.num_generations": 16}  # one group in the completions of a step
    assert groups["32"].knobs == {"grpo.num_generations": 32, "prompts_per_step": 2}
    seconds = [groups[name].sample_s.value for name in ("2", "4", "8 (now)", "16", "32")]
    assert seconds == sorted(seconds) and seconds[2] / seconds[1] == pytest.approx(2.0, rel=0.1)


def test_passes_are_counted_from_the_configuration() -> None:
    plan = plan_of(basis(), NOW)
    rows = {row.name: row for row in plan.passes}  # no old policy; a prompt of 160 tokens and 12 of completion
    assert {name: row.rows for name, row in rows.items()} == {
        "generation": 8, "reference": 8, "training, forward": 8, "training, backward": 16,
    }  # fmt: skip
    assert rows["generation"].tokens == 8 * 172 and rows["generation"].shared_tokens == 160 + 8 * 12
    assert plan.supervised_tokens == 3 * 172 and not any(row.shares for row in plan.passes)
    text = render_plan(plan)
    assert "6 880 tokens go through the model for a sample" in text and "13 times the 516" in text


def test_a_report_tells_what_its_record_did(tmp_path: Path) -> None:
    record = demo_record(trainer=trainer_facts(train_rows=500, held_out_rows=64))
    spent = [0.0, 9.0, 0.0]
    stages = [
        StageRow(name=row.name, per_step_s=[0.04 + s for s in spent], parts={"log": [0.04] * 3, "evaluate": spent})
        if row.name == "log_save_eval"
        else row
        for row in record.timings.stages
    ]
    step_s = [s + more for s, more in zip(record.timings.step_s, spent, strict=True)]
    timings = record.timings.model_copy(update={"stages": stages, "step_s": step_s})
    config = config_of(record, grpo=EVALUATES, data=HELD_OUT)
    report = build_report(record.model_copy(update={"timings": timings}), CPU_MACHINE, config=config)
    assert report.occasions == {"evaluate": 9.0}
    save_report(report, tmp_path)
    again = basis_of_run(tmp_path)
    assert again.once_s == {"evaluate": 9.0} and again.models.base == config
    before, after = (Models.from_probe(config, one, CPU_MACHINE) for one in (record, again.models.record))
    assert after.step_s(config).value == pytest.approx(before.step_s(config).value, rel=0.02)
    assert record_of(report).timings.step_s == pytest.approx(record.timings.step_s, abs=0.02)


def test_what_is_printed_and_what_json_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluating()
    save_report(build_report(one.models.record, CPU_MACHINE, config=one.models.base), tmp_path)
    assert main(["plan", str(tmp_path), "--samples", "1000", "--json"]) == 0
    plan = Plan.model_validate_json(capsys.readouterr().out)
    assert json.loads(plan.model_dump_json(by_alias=True))["schema"] == Plan.schema_name() and plan.steps == 500
    assert main(["plan", str(tmp_path), "--samples", "1000"]) == 0
    text = capsys.readouterr().out
    assert "1000 samples in 500 optimizer steps: " in text and "measured) per sample" in text
    assert "An evaluation every 10 steps and at the end: 50 times" in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        (None, [], "there is no report here"),
        ("{", [], "this is not a JSON file"),
        ('{"schema": "grpo-autotune/report/9"}', [], "the report has the schema 'grpo-autotune/report/9'"),
        ("{}", ["--with-eval"], "a stored run is not measured again"),
        ("{}", ["--samples", "0"], "--samples"),
        ("{}", ["--samples", "99999999999"], "--samples"),
        ("{}", ["--memory", "inf"], "--memory"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    content: str | None, words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["plan", str(tmp_path), *words]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1


def test_a_large_evaluation_that_no_step_held_is_advised_against() -> None:
    one = evaluating({"evaluate": 50.0})

    def facts(record: ProbeRecord, config: RunConfig) -> Facts:
        return Facts(record, break_down(record.timings), machine=CPU_MACHINE, config=config)

    timed = one.models.record.model_copy(update={"occasions": {"evaluate": 50.4}})
    (advice,) = (a for a in judge(facts(timed, one.models.base)) if a.changes and a.changes[0].key == "grpo.eval_steps")
    assert advice.kind == "exact" and advice.changes[0].after == 20 and advice.predicted_saving is None
    assert "50% of the run" in advice.text and "1.33 times as fast" in advice.text  # 10 steps of 5.04 s
    idea = observed.unseen_evaluation(facts(one.models.record, one.models.base))
    assert idea is not None and "(predicted) on 64 rows" in idea.because
    seldom = evaluating(eval_steps=1000)
    assert observed.unseen_evaluation(facts(seldom.models.record, seldom.models.base)) is None


def test_other_models_and_memories() -> None:
    trainer = trainer_facts(peft={"peft_type": "LORA", "r": 8, "target_modules": "all-linear"})
    one = replace(basis(demo_record(trainer=trainer)), memory_bytes=CPU_MACHINE.memory_bytes)
    plan = plan_of(one, NOW, memory_gb=0.5)
    rows = {row.name: row for row in plan.tables["model"]}
    assert set(rows) == {
        "qwen2.5-vl-3b",
        "qwen2.5-vl-7b",
        "qwen3-vl-2b",
        "qwen3-vl-4b",
        "qwen3-vl-8b",
    }  # data has images
    assert rows["qwen3-vl-2b"].sample_s.value < rows["qwen3-vl-4b"].sample_s.value < rows["qwen3-vl-8b"].sample_s.value
    assert rows["qwen3-vl-2b"].sample_s.value > 100.0 * plan.sample_s.value  # 600 times the weights
    assert not rows["qwen3-vl-8b"].fits and rows["qwen3-vl-8b"].peak_bytes.value > 30e9
    small, *larger = plan.budgets.values()
    assert list(plan.budgets) == ["0.5 GB", "24 GB", "40 GB", "80 GB", "141 GB"]
    assert set(small.values()) == {None}  # the process itself has taken 2 GiB
    assert all(budget["grpo.per_device_train_batch_size"] == 16 for budget in larger)
    text = demo_record(images=None, trainer=trainer)
    assert len(plan_of(basis(text), NOW).tables["model"]) == 9


def test_phases_are_whole_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluating({"evaluate": 100.0})
    save_report(
        build_report(
            one.models.record.model_copy(update={"occasions": one.once_s}), CPU_MACHINE, config=one.models.base
        ),
        tmp_path,
    )
    words = ["--samples", "5000", "--write-phases", str(tmp_path / "phases"), "--html", str(tmp_path / "plan.html")]
    assert main(["plan", str(tmp_path), *words]) == 0
    phases = {name: load_config(tmp_path / "phases" / f"{name}.yaml") for name in ("quick", "full", "final")}
    assert {name: phase.grpo["max_steps"] for name, phase in phases.items()} == {
        "quick": 691,
        "full": 2500,
        "final": 2500,
    }
    assert [phase.grpo["eval_steps"] for phase in phases.values()] == [
        691,
        50,
        10,
    ]  # an hour less the start and one evaluation
    assert {phase.model.name_or_path for phase in phases.values()} == {"nowhere/model"}
    head = (tmp_path / "phases" / "quick.yaml").read_text()
    assert "# Predicted to take 1 h 00 min " in head and "# grpo.max_steps: 100 -> 691" in head
    page = (tmp_path / "plan.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "5000 samples in 2500 optimizer steps" in page
    assert "5000 samples" in capsys.readouterr().out


def test_phases_of_a_run_that_evaluates_by_epoch(tmp_path: Path) -> None:
    kept = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    write_phases(tmp_path, evaluating({"evaluate": 5000.0}, **kept).with_length(5000), tmp_path)
    quick, full, final = (load_config(tmp_path / f"{name}.yaml").grpo for name in ("quick", "full", "final"))
    assert (quick["eval_strategy"], quick["eval_steps"], quick["save_steps"]) == ("steps", 1, 1)  # one takes 1.4 hours
    assert (full["eval_strategy"], full["save_strategy"], full["eval_steps"], full["save_steps"]) == (
        "steps",
        "steps",
        1250,
        1250,
    )
    assert final["eval_strategy"] == "epoch" and "eval_steps" not in quick.keys() - full.keys()


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_report(build_report(basis().models.record, CPU_MACHINE, config=basis().models.base), tmp_path)
    (tmp_path / "file").write_text("")
    for option, place in (("--html", "none/plan.html"), ("--write-phases", "file/phases")):
        assert main(["plan", str(tmp_path), option, str(tmp_path / place)]) == 2
        line = capsys.readouterr().err
        assert "cannot be written" in line and line.count("\n") == 1


@pytest.mark.parametrize("slower", [1.0, 2.0])  # on a worker's place, which is taken out of its trials
def test_a_search_is_planned_from_its_trials(slower: float, tmp_path: Path) -> None:
    one = basis()
    stored = json.loads((Path(__file__).parents[1] / "stored" / "search.json").read_text())
    stored |= {"config": one.models.base.model_dump(mode="json")}
    stored["config"]["grpo"] |= EVALUATES
    stored["config"]["data"] |= HELD_OUT
    smaller = plan_of(one, NOW).tables["image size"][1].knobs
    stored["baseline"]["knobs"] = knobs_of(one.models.base, list(smaller))  # the file's are of another configuration
    (tmp_path / "search.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="the trials of this search are gone"):
        basis_of_run(tmp_path)
    folders = [tmp_path / "trials" / f"{number:04d}" for number in range(3)]
    asked = ("probe", {}), ("timed", {}), ("timed", smaller)
    for number, (folder, (purpose, knobs)) in enumerate(zip(folders, asked, strict=True)):
        folder.mkdir(parents=True)
        spec = TrialSpec(number=number, purpose=purpose, config=stored["config"], knobs=knobs)
        spec = spec.model_copy(update={"place": "core 0" if purpose == "timed" and slower > 1.0 else None})
        (folder / "spec.json").write_text(spec.model_dump_json())
        record = one.models.record.model_copy(update={"occasions": {"evaluate": 30.0}})
        outcome = TrialOutcome(number=number, status="ok", record=record, step_s=record.timings.step_s)
        outcome = faster(outcome, 1.0 if spec.place is None else 1.0 / slower)
        (folder / "outcome.json").write_text(outcome.model_dump_json())
    searched = basis_of_run(tmp_path)
    assert searched.once_s == {"evaluate": 30.0} and len(searched.models.outcomes) == 3
    rows = plan_of(searched, NOW).tables["image size"]
    assert next(row for row in rows if row.knobs == smaller).speed == pytest.approx(1.0, abs=0.2)  # as slow as now


def test_a_run_of_several_ranks_is_planned_for_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    record = demo_record(trainer=trainer_facts(world_size=2, generation_batch_size=32))
    save_report(build_report(record, CPU_MACHINE, config=config_of(record)), tmp_path)
    plan = plan_of(basis_of_run(tmp_path), NOW)
    assert plan.samples == 400 and plan.sample_s.value == pytest.approx(5.04 / 4)  # 4 prompts in a step of both
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"had 2 ranks.*WORLD_SIZE=2"):
        basis_of_run(tmp_path)
