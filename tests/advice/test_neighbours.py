"""One predictor: what is advised is what the search's models say of the same change, for every knob."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.advice.facts import Facts
from grpo_autotune.advice.judge import judge
from grpo_autotune.advice.learning import LENGTH
from grpo_autotune.advice.neighbours import changes, neighbour, neighbours
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.estimate.architectures import ARCHITECTURES
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import PROMPTS, TABLE, knob, with_knobs
from grpo_autotune.knobs.apply import GROUP, MICRO
from grpo_autotune.predict.models import Models
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search.session import search
from tests.estimate.test_shapes import CONFIGS
from tests.support.paper_machine import Listener, PaperTrials
from tests.support.sample_records import (
    CPU_MACHINE,
    GIB,
    GPU_MACHINE,
    config_of,
    demo_record,
    trainer_facts,
    vllm_record,
)

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3", "llama")


def record_of(family: str) -> ProbeRecord:
    """A probe of a model of the family, with images where it has eyes."""
    sees = "vision_config" in CONFIGS[family]
    trainer = trainer_facts(model_config_json=CONFIGS[family], gradient_checkpointing=True)
    return demo_record(trainer=trainer, **({} if sees else {"images": None}))


def facts_of(record: ProbeRecord, config: RunConfig | None, machine: Machine = CPU_MACHINE) -> Facts:
    return Facts(record=record, breakdown=break_down(record.timings), machine=machine, config=config)


CASES = [(record_of(family), CPU_MACHINE, {"data": {"image_size": 384}}) for family in FAMILIES]
CASES += [(vllm_record(), GPU_MACHINE, {"vllm": {"max_num_seqs": 8, "enable_sleep_mode": True}})]
CASES += [(record_of(family), CPU_MACHINE, None) for family in FAMILIES]


@pytest.mark.parametrize(("record", "machine", "sections"), CASES)
def test_every_knob_is_advised_with_the_seconds_that_the_search_predicts(
    record: ProbeRecord, machine: Machine, sections: dict[str, Any] | None
) -> None:
    facts = facts_of(record, None if sections is None else config_of(record, **sections), machine)
    assert facts.base is not None
    # The search's models, made of the probe as a trial.
    outcome = TrialOutcome(number=0, status="ok", record=record, step_s=record.timings.step_s)
    models = Models.from_probe(facts.base, record, machine, outcome)
    own_s = models.step_s(facts.base).value
    asked = set()
    for row, nearby in neighbours(facts):
        for near in nearby:
            asked.add(row.key)
            assert near.saving_s == own_s - models.step_s(with_knobs(facts.base, near.knobs)).value
    expected = {"speedups", "grpo.dataloader_num_workers", "grpo.num_iterations", MICRO, GROUP}
    assert asked >= expected | ({"grpo.beta"} if record.trainer.beta else set())
    keys = {row.key for row in TABLE}
    advised = [advice for advice in judge(facts) if keys & {change.key for change in advice.changes}]
    assert advised
    for advice in advised:
        if advice.predicted_saving is not None:
            after = RunConfig.from_dict(_set(facts.base, advice.changes))
            assert advice.predicted_saving == pytest.approx(own_s - models.step_s(after).value, rel=1e-9)


@pytest.mark.parametrize(("record", "machine", "sections"), CASES)
def test_the_base_is_predicted_as_its_report_tells_it(
    record: ProbeRecord, machine: Machine, sections: dict[str, Any] | None
) -> None:
    facts = facts_of(record, None if sections is None else config_of(record, **sections), machine)
    assert facts.base is not None and facts.models is not None
    predicted = {name: stage.value for name, stage in facts.models.stages_s(facts.base).items()}
    ran = {name: seconds for name, seconds in facts.breakdown.self_s.items() if seconds > 0.0}
    assert predicted == pytest.approx(ran, rel=1e-6)


def _set(base: RunConfig, told: Any) -> dict[str, Any]:
    """The user's file after the advice was followed."""
    values = base.to_dict()
    for change in told:
        section, _, name = change.key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = change.after
    return values


def test_a_search_without_a_budget_predicts_what_the_probe_advises(tmp_path: Path) -> None:
    record = record_of("qwen3_vl")
    search_section = {"knobs": {row.key: None for row in TABLE if row.key != "speedups"}}
    config = config_of(record, data={"image_size": 384}, search=search_section)

    def act(spec: TrialSpec) -> TrialOutcome:
        return TrialOutcome(number=spec.number, status="ok", record=record, step_s=record.timings.step_s)

    report = search(
        config,
        budget_s=0.0,
        out=None,
        run_dir=tmp_path,
        view=Listener(),
        runner=lambda path: PaperTrials(path, act=act),
        machine=CPU_MACHINE,
    )
    near = neighbour(facts_of(record, config), {"speedups": "auto"})
    assert near is not None and report.best.changed == {"speedups": "auto"}
    own_s = sum(near.before.values())
    assert report.best.speedup == pytest.approx(own_s / (own_s - near.saving_s), rel=1e-9)


def test_a_trainer_without_a_configuration_is_asked_about_the_knobs_that_reach_it() -> None:
    facts = facts_of(record_of("qwen3_vl"), None)
    asked = {row.key for row, nearby in neighbours(facts) if nearby}
    assert {"data.image_size", MICRO, "grpo.gradient_checkpointing", "speedups"} <= asked
    assert not {"model.attn_implementation", "peft.r"} & asked
    engine = facts_of(vllm_record(), None, GPU_MACHINE)
    asked = {row.key for row, _ in neighbours(engine)}
    assert MICRO in asked, "and about no key whose value the probe does not record"
    assert not {key for key in asked if key.startswith("vllm.")} | asked & {"grpo.torch_compile"}
    elsewhere = trainer_facts(model_config_json=CONFIGS["qwen3"], num_generations=7)
    assert list(neighbours(facts_of(demo_record(trainer=elsewhere), None))) == [], "no legal batch in this process"


def test_what_may_not_fit_is_not_advised() -> None:
    record = record_of("qwen3")
    roomy = facts_of(record, None)
    tight = facts_of(record, None, CPU_MACHINE.model_copy(update={"memory_bytes": 2 * GIB}))
    assert neighbour(roomy, {MICRO: 16}) is not None and neighbour(tight, {MICRO: 16}) is None
    unknown = demo_record(trainer=trainer_facts(model_config_json={"hidden_size": 8, "num_experts": 4}))
    assert neighbour(facts_of(unknown, None), {MICRO: 16}) is None, "nobody knows what it takes"
    assert neighbour(facts_of(unknown, None), {"grpo.beta": 0.0}) is not None


@pytest.mark.parametrize("given", [{}, {"steps_per_generation": 8}, {"generation_batch_size": 16}])
@pytest.mark.parametrize("knobs", [{MICRO: 8}, {GROUP: 4, PROMPTS: 2}])
def test_changes_make_the_configuration_that_was_predicted(given: dict[str, Any], knobs: dict[str, Any]) -> None:
    record = record_of("qwen3")
    facts = facts_of(record, config_of(record, grpo=given))
    near = neighbour(facts, knobs)
    assert facts.base is not None and near is not None
    after = RunConfig.from_dict(_set(facts.base, changes(facts, near)))
    assert after.batch == near.config.batch
    assert after.batch.generation_batch == (16 if MICRO in knobs else 8)
    assert all(change.before is not None for change in changes(facts, near))


def test_loader_workers_hide_loading_on_idle_cores_behind_the_rest_of_the_step() -> None:
    near = neighbour(facts_of(record_of("qwen3_vl"), None), {"grpo.dataloader_num_workers": 2})
    assert near is not None  # the cores are 240 % / 4 = 60 % busy
    assert near.after["data"] == pytest.approx(0.6 * near.before["data"])


def test_an_engine_that_stays_awake_spends_no_time_on_falling_asleep() -> None:
    record = vllm_record()
    engine = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3}
    facts = facts_of(record, config_of(record, vllm=engine), GPU_MACHINE)
    near = neighbour(facts, {"vllm.sleep_level": 0})
    assert near is not None and near.saving_s == pytest.approx(1.0) and near.stages == ("engine",)
    assert [(c.key, c.after) for c in changes(facts, near)] == [("vllm.enable_sleep_mode", False)]
    large = config_of(record, vllm=engine | {"gpu_memory_utilization": 0.8})
    stages = [row.model_copy(update={"peak_bytes": 70 * GIB}) for row in record.timings.stages]
    full = record.model_copy(update={"timings": record.timings.model_copy(update={"stages": stages})})
    assert neighbour(facts_of(full, large, GPU_MACHINE), {"vllm.sleep_level": 0}) is None, "not beside the trainer"


def test_several_ranks_wait_for_each_other_however_a_step_is_split() -> None:
    for ranks, waits in ((1, 0.25), (2, 1.0)):
        record = record_of("qwen3")
        trainer = record.trainer.model_copy(update={"world_size": ranks})
        stages = [
            row.model_copy(update={"per_step_s": [0.8] * 3}) if row.name == "sync_wait" else row
            for row in record.timings.stages
        ]
        waiting = record.timings.model_copy(update={"stages": stages})
        facts = facts_of(record.model_copy(update={"trainer": trainer, "timings": waiting}), None)
        near = neighbour(facts, {MICRO: 8})
        assert near is not None
        assert near.after["sync_wait"] / near.before["sync_wait"] == pytest.approx(waits, rel=0.01)


def test_a_real_model_on_a_gpu_is_predicted_from_its_configuration() -> None:
    trainer = vllm_record().trainer.model_copy(update={"model_config_json": ARCHITECTURES["qwen3-8b"].config})
    record = vllm_record(trainer=trainer)
    near = neighbour(facts_of(record, config_of(record), GPU_MACHINE), {LENGTH: 504})
    assert near is not None and near.saving_s > 0.0
    assert knob(LENGTH).current(near.config) == 504
