"""The stage of ZeRO and what the host keeps, as knobs: offered beside DeepSpeed, exact, and written back."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.advice.facts import Facts
from grpo_autotune.advice.neighbours import changes, neighbour
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import context_of, kind_of, knob, with_knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.knobs.sharding import OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS, STAGE
from grpo_autotune.predict.models import LINK_BYTES_S, Models
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.records.probe import ProbeRecord, Sharding
from grpo_autotune.report.plan import Basis, plan_of
from grpo_autotune.search.space import space
from tests.knobs.test_knobs import config, machine
from tests.report.test_plan import NOW
from tests.support.sample_records import CPU_MACHINE, config_of, timings, two_rank_record


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def values(key: str, one: RunConfig, here: Machine) -> tuple[Any, ...]:
    return knob(key).values(context_of(one, here))


def test_stages_are_offered_where_several_ranks_train_by_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("zero2", zero(2)):
        one = config(deepspeed=asked)
        assert values(STAGE, one, machine()) == (2, 1, 3)
        assert space(one, machine()).values[STAGE] == (2, 1, 3)
        assert kind_of(one, STAGE) == kind_of(one, OFFLOAD_OPTIMIZER) == "exact"
        assert values(OFFLOAD_OPTIMIZER, one, machine()) == ()
        assert values(OFFLOAD_OPTIMIZER, one, machine(gpus=2)) == ("none", "cpu")
    assert values(STAGE, config(), machine()) == ()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert values(STAGE, config(deepspeed="zero2"), machine()) == ()


@pytest.mark.parametrize(
    ("asked", "knobs", "reason"),
    [
        ("zero2", {STAGE: 4}, "is none of 1, 2 and 3"),
        ("zero2", {OFFLOAD_OPTIMIZER: "cpu"}, "saves nothing without a GPU"),
        (None, {STAGE: 3}, "there is no grpo.deepspeed"),
        (zero(3, offload_param={"device": "cpu"}), {STAGE: 2}, "offload_param.device needs stage 3"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(asked: Any, knobs: dict[str, Any], reason: str) -> None:
    said = why_not(config(deepspeed=asked) if asked else config(), knobs, machine())
    assert said is not None and reason in said
    both = {OFFLOAD_PARAMETERS: "cpu", STAGE: 3}
    assert why_not(config(deepspeed="zero2"), both, machine(gpus=2)) is None


def test_a_name_stays_a_name_and_a_mapping_keeps_what_else_it_says() -> None:
    assert with_knobs(config(deepspeed="zero2"), {STAGE: 3}).grpo["deepspeed"] == "zero3"
    given = {**zero(2, overlap_comm=False), "gradient_clipping": 0.5}
    turned = with_knobs(config(deepspeed=given), {STAGE: 3}).grpo["deepspeed"]
    assert turned["gradient_clipping"] == 0.5 and turned["zero_optimization"]["overlap_comm"] is False
    assert turned["zero_optimization"]["stage"] == 3
    assert turned["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert given["zero_optimization"]["stage"] == 2 and "bf16" not in turned
    for asked in ("zero2", {"name": "zero2"}, zero(2)):
        one = with_knobs(config(deepspeed=asked), {OFFLOAD_OPTIMIZER: "cpu"})
        assert knob(OFFLOAD_OPTIMIZER).current(one) == "cpu" and knob(STAGE).current(one) == 2
        back = with_knobs(one, {OFFLOAD_OPTIMIZER: "none"})
        assert knob(OFFLOAD_OPTIMIZER).current(back) == "none"
    with pytest.raises(ConfigError, match=r"no grpo\.deepspeed"):
        with_knobs(config(), {STAGE: 2})


def probed(stage: int) -> tuple[RunConfig, ProbeRecord]:
    """A probe of two ranks under ZeRO, by name."""
    record = two_rank_record()
    shared = Sharding(name=f"ZeRO-{stage}", ranks=2, parameters=0.5 if stage == 3 else 1.0, optimizer=0.5)
    shares = {("policy_logprob", "training_forward"): 0.9, ("sync_wait", "gather_parameters"): 0.3}
    seen = timings(record.ranks[0].stages, shares | {("sync_wait", "reduce_gradients"): 0.2})
    trainer = record.trainer.model_copy(update={"sharding": shared})
    record = record.model_copy(update={"trainer": trainer, "timings": seen})
    return config_of(record, grpo={"deepspeed": f"zero{stage}"}), record


def test_stages_are_predicted_by_what_they_send_and_hold() -> None:
    one, record = probed(2)
    models = Models.from_probe(one, record, CPU_MACHINE)
    three = with_knobs(one, {STAGE: 3})
    before, after = models._load(one).sent["collectives"], models._load(three).sent["collectives"]
    waits = models.stages_s(one)["sync_wait"].value, models.stages_s(three)["sync_wait"].value
    assert after > 4 * before and waits[1] == pytest.approx(0.8 + (after - before) / LINK_BYTES_S["cpu"], rel=0.01)
    assert models.stages_s(three)["backward"].value == pytest.approx(models.stages_s(one)["backward"].value)
    wide = models.stages_s(three)["sync_wait"]
    assert wide.high / wide.value > models.stages_s(one)["sync_wait"].high / waits[0]
    assert models.stages_s(with_knobs(one, {STAGE: 1}))["sync_wait"].value < waits[0]  # fewer reductions

    stage3, seen = probed(3)
    models = Models.from_probe(stage3, seen, CPU_MACHINE)
    less = models.stages_s(with_knobs(stage3, {STAGE: 2}))["sync_wait"]
    assert 0.3 < less.value < 0.5  # what is not exchanged otherwise, at the rate that the probe measured


def test_advice_and_plan_name_the_stage_as_the_user_wrote_it() -> None:
    one, record = probed(3)
    facts = Facts(record, break_down(record.timings), {}, CPU_MACHINE, one)
    near = neighbour(facts, {STAGE: 2})
    assert near is not None and near.saving_s > 0.0 and near.stages == ("sync_wait",)
    (change,) = changes(facts, near)
    assert (change.key, change.before, change.after) == ("grpo.deepspeed", "zero3", "zero2")
    plan = plan_of(Basis(Models.from_probe(one, record, CPU_MACHINE), "there"), NOW)
    rows = plan.tables["sharding"]
    assert [row.name for row in rows] == ["ZeRO-3 (now)", "ZeRO-1", "ZeRO-2"]
    assert all(row.peak_bytes.value > 0 and row.sample_s.low < row.sample_s.high for row in rows)
