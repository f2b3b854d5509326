"""Each rule of the verdict against numbers worked out by hand, and the ranking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.advice import exact, learning, speedups
from grpo_autotune.advice.bound import bound, warnings
from grpo_autotune.advice.breakdown import Limit, break_down
from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.advice.judge import advice_of, amdahl, judge
from grpo_autotune.advice.learning import living_share
from grpo_autotune.records.probe import (
    ProbeRecord,
    RankTimings,
    RewardCall,
    StageRow,
    StageTimings,
    TrainerFacts,
    Utilisation,
)
from grpo_autotune.records.report import Change
from tests.support.sample_records import (
    CPU_MACHINE,
    GIB,
    GPU_MACHINE,
    demo_record,
    image_facts,
    spread,
    timings,
    token_facts,
    trainer_facts,
    two_rank_record,
    vllm_record,
)

LIMITS = {
    "generation": Limit(0.04, "memory"),
    "backward": Limit(0.35, "matrix"),
    "policy_logprob": Limit(0.30, "matrix"),
    "reference_logprob": Limit(0.30, "matrix"),
}


def facts(record: ProbeRecord | None = None, **more: Any) -> Facts:
    record = record or demo_record()
    plain: dict[str, Any] = {"limits": LIMITS, "machine": CPU_MACHINE, "config": {}}
    return Facts(record=record, breakdown=break_down(record.timings), **plain | more)


def changes(idea: Idea | None) -> dict[str, Any]:
    assert idea is not None
    return {change.key: change.after for change in idea.changes}


def on_gpu(**more: Any) -> ProbeRecord:
    """A text run on one GPU that samples by `generate` and is busy for 90 % of its passes."""
    seconds = {"generation": 20.0, "policy_logprob": 3.0, "backward": 6.0, "other": 0.1}
    plain: dict[str, Any] = {
        "timings": timings(seconds, {("policy_logprob", "training_forward"): 3.0}),
        "trainer": trainer_facts(device="cuda", dtype="bfloat16", beta=0.0),
        "images": None,
        "utilisation": [Utilisation(stage="backward", samples=9, gpu_percent=90.0)],
    }
    return demo_record(**plain | more)


# exact rules


def test_micro_batch_saves_the_idle_share_of_the_passes() -> None:
    idea = exact.micro_batch(facts())
    assert changes(idea) == {"grpo.per_device_train_batch_size": 8, "grpo.gradient_accumulation_steps": 2}
    assert idea and idea.kind == "exact"
    idle = 1 - 240 / 100 / 4
    assert idea.saving_s == pytest.approx((0.9 + 0.7 + 1.6) * idle * (1 - 1 / 4))


def test_ranks_share_the_cores() -> None:
    assert facts().busy_share("backward") == pytest.approx(0.6)
    two = demo_record(trainer=trainer_facts(world_size=2))
    assert facts(two, machine=CPU_MACHINE | {"cores": 8}).busy_share("backward") == pytest.approx(0.6)


def test_micro_batch_saves_reading_the_weights_where_memory_binds() -> None:
    record = on_gpu()
    idea = exact.micro_batch(facts(record, machine=GPU_MACHINE, limits={"backward": Limit(0.5, "memory")}))
    assert idea and idea.saving_s == pytest.approx((3.0 * 0.1 + 6.0 * (0.1 + 0.5)) * (1 - 1 / 8))


def test_micro_batch_keeps_steps_per_generation_in_step() -> None:
    idea = exact.micro_batch(facts(demo_record(trainer=trainer_facts(steps_per_generation=16))))
    assert changes(idea)["grpo.steps_per_generation"] == 4


def generation_batch(trainer: TrainerFacts, changed: dict[str, Any], given: dict[str, Any]) -> int:
    """Rows of a generation after the changes, by the rules of TRL's `GRPOConfig.__post_init__`."""
    after = given | {key.removeprefix("grpo."): value for key, value in changed.items()}
    micro = after.get("per_device_train_batch_size", trainer.per_device_train_batch_size) * trainer.world_size
    accumulation = after.get("gradient_accumulation_steps", trainer.gradient_accumulation_steps)
    assert not {"generation_batch_size", "steps_per_generation"} <= set(after)
    return int(after.get("generation_batch_size", micro * after.get("steps_per_generation", accumulation)))


GIVEN = [{}, {"steps_per_generation": 8}, {"generation_batch_size": 16}]


@pytest.mark.parametrize("given", GIVEN)
def test_micro_batch_leaves_the_generation_batch_as_it_is(given: dict[str, Any]) -> None:
    changed = changes(exact.micro_batch(facts(config={"grpo": given})))
    assert generation_batch(trainer_facts(), changed, given) == 16
    assert changed.get("grpo.steps_per_generation") == (2 if "steps_per_generation" in given else None)


@pytest.mark.parametrize(
    "given", [{"steps_per_generation": 16, "num_iterations": 2}, {"generation_batch_size": 32, "num_iterations": 2}]
)
def test_micro_batch_leaves_a_larger_generation_batch_as_it_is(given: dict[str, Any]) -> None:
    trainer = trainer_facts(steps_per_generation=16, generation_batch_size=32, num_iterations=2)
    idea = exact.micro_batch(facts(demo_record(trainer=trainer), config={"grpo": given}))
    assert generation_batch(trainer, changes(idea), given) == 32


@pytest.mark.parametrize("given", [{}, {"steps_per_generation": 16}, {"generation_batch_size": 32}])
def test_fewer_generations_halve_the_generation_batch(given: dict[str, Any]) -> None:
    trainer = trainer_facts(
        num_generations=32, gradient_accumulation_steps=16, steps_per_generation=16, generation_batch_size=32
    )
    slow = timings({"generation": 0.4, "policy_logprob": 4.0, "backward": 5.0})
    record = demo_record(trainer=trainer, timings=slow)
    changed = changes(learning.fewer_generations(facts(record, config={"grpo": given})))
    assert changed["grpo.num_generations"] == 16 and changed["grpo.gradient_accumulation_steps"] == 8
    assert generation_batch(trainer, changed, given) == 16


@pytest.mark.parametrize(
    ("trainer", "config", "word"),
    [
        ({"loss_type": "bnpo"}, {}, "bnpo"),
        ({}, {"grpo": {"top_entropy_quantile": 0.2}}, "top_entropy_quantile"),
        ({}, {"grpo": {"entropy_coef": 0.01}}, "entropy bonus"),
        ({"model_config_json": {"hidden_size": 8, "num_hidden_layers": 1, "num_experts": 4}}, {}, "balance"),
    ],
)
def test_micro_batch_changes_learning_where_the_loss_depends_on_the_split(
    trainer: dict[str, Any], config: dict[str, Any], word: str
) -> None:
    idea = exact.micro_batch(facts(demo_record(trainer=trainer_facts(**trainer)), config=config))
    assert idea and idea.kind == "learning" and word in idea.caveat


def test_micro_batch_grows_only_as_far_as_memory_and_accumulation_allow() -> None:
    # Peak 2 GiB, of which all but the weights would grow; 0.9 * 4 GiB - 2 GiB is left: less than twice the peak.
    assert exact.micro_batch(facts(machine=CPU_MACHINE | {"memory_bytes": 4 * GIB})) is None
    single = trainer_facts(gradient_accumulation_steps=1, steps_per_generation=1)
    assert exact.micro_batch(facts(demo_record(trainer=single))) is None
    assert exact.micro_batch(facts(machine=None)) is None


def test_packed_weights_count_for_half_a_byte_each() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "quantization_config": {"load_in_4bit": True}}
    packed = trainer_facts(device="cuda", dtype="bfloat16", parameters=GIB, model_config_json=config)
    plain = packed.model_copy(update={"model_config_json": {}})
    machine = {"gpus": [{"name": "x", "memory_bytes": int(3.5 * GIB)}]}
    # Peak 2 GiB. Packed: 0.5 GiB of weights, 1.5 GiB would double into the 1.15 GiB left. Plain: 2 GiB of weights.
    assert exact.micro_batch(facts(on_gpu(trainer=packed), machine=machine)) is None
    assert exact.micro_batch(facts(on_gpu(trainer=plain), machine=machine)) is not None


def test_checkpointing_off_saves_one_forward_or_its_part_of_backward() -> None:
    full = vllm_record()
    idea = exact.gradient_checkpointing(facts(full, machine=GPU_MACHINE))
    assert idea and idea.saving_s == pytest.approx(min(3.2, 11.0 / 3))
    lora = full.model_copy(update={"trainer": full.trainer.model_copy(update={"peft": {"r": 8}})})
    slow = lora.model_copy(
        update={
            "timings": timings({"policy_logprob": 9.0, "backward": 6.0}, {("policy_logprob", "training_forward"): 9.0})
        }
    )
    idea = exact.gradient_checkpointing(facts(slow, machine=GPU_MACHINE))
    assert idea and idea.saving_s == pytest.approx(3.0)


def test_checkpointing_stays_where_it_is_off_or_needed() -> None:
    assert exact.gradient_checkpointing(facts()) is None
    small = {"gpus": [{"name": "x", "memory_bytes": 8 * GIB}]}
    assert exact.gradient_checkpointing(facts(vllm_record(), machine=small)) is None


def test_activation_bytes_by_hand() -> None:
    record = demo_record()
    text = 17 * 128 * 4 * 2 * (170 + 16)
    vision = 17 * 64 * 3 * 2 * 192 * 4
    assert exact.activation_bytes(facts(record)) == pytest.approx((text + vision) * 4)
    eager = demo_record(trainer=trainer_facts(attn_implementation="eager"))
    scores = 2.5 * 4 * 4 * 2 * 186**2
    assert exact.activation_bytes(facts(eager)) == pytest.approx((text + scores + vision) * 4)


def test_loader_workers_hide_loading_on_idle_cores() -> None:
    idea = exact.loader_workers(facts())
    assert changes(idea) == {"grpo.dataloader_num_workers": 3}
    assert idea and idea.saving_s == pytest.approx(0.28 * (1 - 0.6))


def test_loader_workers_cannot_hide_more_than_the_rest_of_the_step() -> None:
    record = on_gpu(timings=timings({"data": 12.0, "backward": 1.0}, {("data", "load"): 12.0}))
    idea = exact.loader_workers(facts(record, machine=GPU_MACHINE))
    assert idea and idea.saving_s == pytest.approx(13.0 - 12.0 / 4)
    assert exact.loader_workers(facts(demo_record(trainer=trainer_facts(dataloader_num_workers=2)))) is None
    assert exact.loader_workers(facts(machine=CPU_MACHINE | {"cores": 1})) is None


def test_a_waiting_reward_is_made_asynchronous() -> None:
    idea = exact.waiting_reward(facts(vllm_record()))
    assert idea and "judge" in idea.action
    assert idea.saving_s == pytest.approx(4.0 * (1 - 0.04) * (1 - 1 / 16))


def test_a_computing_or_asynchronous_reward_is_left_alone() -> None:
    busy = [Utilisation(stage="reward", samples=20, cpu_percent=98.0)]
    assert exact.waiting_reward(facts(vllm_record(utilisation=busy))) is None
    awaited = [RewardCall(name="judge", is_async=True, calls=3, mean_s=4.0, max_s=6.0)]
    assert exact.waiting_reward(facts(vllm_record(rewards=awaited))) is None


def test_the_straggler_is_named_with_its_stage() -> None:
    idea = exact.straggler(facts(two_rank_record()))
    assert idea and "rank 1" in idea.action and "generation" in idea.because
    assert idea.saving_s == pytest.approx(0.8)
    assert exact.straggler(facts()) is None


def three_ranks(rank: int) -> Facts:
    """Ranks that work for 1, 4 and 2 seconds of a step of 4, seen from one of them."""
    work = (1.0, 4.0, 2.0)
    rows = [RankTimings(rank=r, step_s=4.0, stages={"backward": s, "sync_wait": 4.0 - s}) for r, s in enumerate(work)]
    seen = timings({"backward": work[rank], "sync_wait": 4.0 - work[rank]})
    return facts(demo_record(ranks=rows, rank=rank, timings=seen))


def test_three_ranks_are_compared_with_the_mean_of_the_others() -> None:
    idea = exact.straggler(three_ranks(0))
    assert idea and "rank 1" in idea.action and idea.stages == ("sync_wait",)
    assert idea.saving_s == pytest.approx(4.0 - 1.5)


def test_seen_from_the_slowest_rank_the_saving_is_in_its_own_stage() -> None:
    idea = exact.straggler(three_ranks(1))
    assert idea and "rank 1" in idea.action and idea.stages == ("backward",)
    assert idea.saving_s == pytest.approx(4.0 - 1.5)


def rare(part: str, spent: list[float]) -> ProbeRecord:
    """Steps of 2 s and what is given on top, the first of them step 8."""
    steps = list(range(8, 8 + len(spent)))
    times = StageTimings(
        steps=steps,
        step_s=[2.0 + s for s in spent],
        stages=[
            StageRow(name="backward", per_step_s=[2.0] * len(steps)),
            StageRow(name="log_save_eval", per_step_s=spent, parts={part: spent}),
        ],
    )
    return demo_record(timings=times)


def test_evaluating_half_as_often_saves_half_of_what_it_takes_in_a_long_run() -> None:
    # One evaluation of 10 s in four measured steps, but one in fifty of the run.
    f = facts(rare("evaluate", [0.0, 0.0, 10.0, 0.0]), config={"grpo": {"eval_steps": 50}})
    idea = exact.log_save_eval(f)
    assert changes(idea) == {"grpo.eval_steps": 100}
    scale = 2.0 / ((4 * 2.0 + 10.0) / 4)  # the median step over the mean
    assert idea and idea.saving_s == pytest.approx(10.0 / 50 / 2 * scale)


def test_the_distance_between_evaluations_is_read_from_the_steps_without_a_configuration() -> None:
    twice = exact.log_save_eval(facts(rare("evaluate", [0.0, 4.0, 0.0, 4.0, 0.0]), config=None))
    assert twice and not twice.changes and "eval_steps" in twice.action
    assert twice.saving_s == pytest.approx(4.0 / 2 / 2 * 2.0 / (2.0 + 8.0 / 5))
    assert exact.log_save_eval(facts(rare("evaluate", [0.0, 4.0, 0.0, 0.0]), config=None)) is None


def test_logging_is_counted_at_its_own_steps() -> None:
    # Steps 8 to 11, logged at step 10; the others hold the look whether to log.
    record = rare("log", [1e-5, 1e-5, 2.0, 1e-5])
    idea = exact.log_save_eval(facts(record, config={"grpo": {"logging_steps": 5}}))
    assert changes(idea) == {"grpo.logging_steps": 10}
    assert idea and idea.saving_s == pytest.approx(2.0 / 5 / 2 * 2.0 / (2.0 + 2.0 / 4), rel=1e-4)
    for settings_of_log in ({}, {"logging_steps": 20}, {"logging_steps": 5, "logging_strategy": "epoch"}):
        assert exact.log_save_eval(facts(record, config={"grpo": settings_of_log})) is None


@pytest.mark.parametrize(("share", "fits"), [(0.5, True), (0.99, False)])
def test_sleep_mode_goes_where_engine_and_trainer_fit_together(share: float, fits: bool) -> None:
    config = {"vllm": {"enable_sleep_mode": True, "gpu_memory_utilization": share}}
    idea = exact.engine_sleep(facts(vllm_record(), machine=GPU_MACHINE, config=config))
    assert (idea is not None) is fits
    assert idea is None or idea.saving_s == pytest.approx(1.0)


# learning rules


def test_image_size_takes_the_largest_size_that_halves_the_tokens() -> None:
    big = image_facts(tokens=spread(1024, 1024, 1024))
    record = demo_record(images=big, tokens=token_facts(prompt=spread(1100, 1100, 1100)))
    idea = learning.image_size(facts(record))
    assert changes(idea) == {"data.image_size": 512}
    fewer = (1024 - 256) / (1100 + 12)
    assert idea and idea.saving_s == pytest.approx(fewer * (0.9 + 0.7 + 1.6 + 0.9))


def test_image_size_falls_back_to_the_configured_size() -> None:
    idea = learning.image_size(facts(config={"data": {"image_size": 384}}))
    assert changes(idea) == {"data.image_size": 256}
    fewer = 144 * (1 - (256 / 384) ** 2) / (160 + 12)
    assert idea and idea.saving_s == pytest.approx(fewer * (0.9 + 0.7 + 1.6 + 0.9))
    assert learning.image_size(facts()) is None
    assert learning.image_size(facts(demo_record(images=None))) is None


def test_images_larger_than_the_model_sees_are_resized_once() -> None:
    idea = learning.oversized_images(facts(demo_record(images=image_facts(pixels=spread(10**6, 10**6, 10**6)))))
    seen = 144 * 32**2
    assert changes(idea) == {"data.image_size": 384}
    assert idea and idea.saving_s == pytest.approx(0.25 * (1 - seen / 10**6))
    assert learning.oversized_images(facts()) is None


def test_beta_zero_saves_the_reference_pass() -> None:
    idea = learning.no_reference(facts())
    assert changes(idea) == {"grpo.beta": 0.0}
    assert idea and idea.kind == "learning" and idea.saving_s == pytest.approx(0.7)
    assert learning.no_reference(facts(vllm_record())) is None


def test_fewer_generations_only_where_useful_completions_keep_up() -> None:
    assert learning.fewer_generations(facts()) is None
    big = trainer_facts(
        num_generations=32, gradient_accumulation_steps=16, steps_per_generation=16, generation_batch_size=32
    )
    record = demo_record(trainer=big, timings=timings({"generation": 0.4, "policy_logprob": 4.0, "backward": 5.0}))
    idea = learning.fewer_generations(facts(record, limits={}))
    assert changes(idea) == {"grpo.num_generations": 16, "grpo.gradient_accumulation_steps": 8}
    assert idea and idea.saving_s == pytest.approx(9.4 / 2)
    bound_by_memory = learning.fewer_generations(facts(record))
    assert bound_by_memory and bound_by_memory.saving_s == pytest.approx(9.0 / 2)


def test_a_long_tail_is_capped_at_the_ninetieth_percentile() -> None:
    idea = learning.long_tail(facts(vllm_record()))
    assert changes(idea) == {"grpo.max_completion_length": 504}
    assert idea and idea.saving_s == pytest.approx(17.0 * (1024 - 504) / (300 + 1024))
    assert learning.long_tail(facts()) is None


def test_vllm_on_a_gpu_less_the_pass_it_costs() -> None:
    idea = learning.use_vllm(facts(on_gpu(), machine=GPU_MACHINE))
    assert idea and idea.saving_s == pytest.approx(20.0 * (1 - 0.04 / 0.5) - 3.0)
    assert learning.use_vllm(facts()) is None
    pictures = learning.use_vllm(facts(on_gpu(images=image_facts()), machine=GPU_MACHINE))
    assert pictures and pictures.saving_s == idea.saving_s


def test_truncated_and_dead_ones_save_no_seconds() -> None:
    cut = learning.truncated(facts(demo_record(tokens=token_facts(truncated_share=0.6))))
    assert cut and cut.saving_s is None and changes(cut) == {"grpo.max_completion_length": 64}
    dead = learning.dead_groups(
        facts(demo_record(tokens=token_facts(dead_groups=12, pass_rates=[0.0] * 12 + [0.5] * 8)))
    )
    assert dead and dead.saving_s is None and changes(dead) == {"grpo.num_generations": 16}
    assert learning.dead_groups(facts()) is None and learning.truncated(facts()) is None


def test_where_no_rewards_differ_no_key_is_named() -> None:
    idea = learning.dead_groups(facts(demo_record(tokens=token_facts(dead_groups=20, pass_rates=[0.0] * 20))))
    assert idea and not idea.changes and "rewards" in idea.action


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(2, 16), st.integers(2, 32))
def test_larger_groups_live_oftener(rates: list[float], seen: int, generations: int) -> None:
    small, large = living_share(rates, seen, generations), living_share(rates, seen, generations + 1)
    assert 0.0 <= small <= large <= 1.0


def test_living_share_of_even_chances() -> None:
    assert living_share([0.5], 8, 2) == pytest.approx(0.5)


# ranking and words


def test_small_savings_stay_silent_and_exact_comes_first() -> None:
    def rule(kind: str, saving: float | None) -> Any:
        return lambda f: Idea(kind=kind, stages=("reward",), because="x", action="y", saving_s=saving)  # type: ignore[arg-type]

    rules = [rule("learning", 2.0), rule("exact", 0.04), rule("exact", 0.3), rule("learning", None), rule("exact", 0.9)]
    found = [(a.kind, a.predicted_saving) for a in judge(facts(), rules)]
    assert found == [("exact", 0.9), ("exact", 0.3), ("learning", 2.0), ("learning", None)]


def test_amdahl() -> None:
    share = 1.6 / 5.04
    assert amdahl(facts(), ["backward"]) == pytest.approx(1 / (1 - share))
    alone = demo_record(timings=timings({"backward": 1.0}))
    assert amdahl(facts(alone), ["backward"]) is None


@pytest.mark.parametrize("record", [demo_record(), vllm_record(), two_rank_record(), on_gpu()])
@pytest.mark.parametrize("machine", [CPU_MACHINE, GPU_MACHINE, None])
@pytest.mark.parametrize("limits", [LIMITS, {}])
@pytest.mark.parametrize("config", [{}, None])
def test_every_advice_is_a_prediction_within_the_step(
    record: ProbeRecord, machine: Any, limits: Any, config: Any
) -> None:
    f = facts(record, machine=machine, limits=limits, config=config)
    for advice in judge(f):
        assert "predicted" in advice.text
        assert advice.predicted_saving is None or 0.0 < advice.predicted_saving < f.breakdown.step_s
        assert advice.ceiling is None or advice.ceiling >= 1.0
        assert advice.text.endswith(".") and ".." not in advice.text
        if advice.predicted_saving is not None and advice.ceiling is not None:
            assert advice.ceiling >= f.breakdown.step_s / (f.breakdown.step_s - advice.predicted_saving) - 1e-9


def test_keys_are_spelled_as_the_reader_will_use_them() -> None:
    change = Change(key="vllm.enable_sleep_mode", before=True, after=False)
    idea = Idea(kind="exact", stages=("engine",), because="x", changes=(change,), saving_s=1.0)
    assert advice_of(idea, facts()).text.startswith("Set vllm.enable_sleep_mode to false (now true): predicted to save")
    own = advice_of(idea, facts(config=None)).text
    assert own.startswith("Pass vllm_enable_sleep_mode=False to GRPOConfig (now true): predicted")


def test_bound_names_one_stage_or_two_and_the_ceiling() -> None:
    assert bound(facts()).startswith("The backward pass (32%) and generation (24%) bound the step of 5.04 s.")
    assert "35% of this machine's matrix rate" in bound(facts())
    text = bound(facts(on_gpu()))
    assert text.startswith("Generation bounds the step: 69% of 29.1 s. It runs at 4.0%") and "small operations" in text
    assert bound(facts(on_gpu(), limits={})) == "Generation bounds the step: 69% of 29.1 s."


def test_warnings() -> None:
    assert warnings(facts()) == []
    assert "0.31 nats" in warnings(facts(vllm_record()))[0]
    loose = demo_record(timings=timings({"backward": 1.0, "other": 0.1}))
    assert "9.1%" in warnings(facts(loose))[0]
    single = demo_record(timings=demo_record().timings.model_copy(update={"step_s": [5.0]}))
    assert any("Only 1 step was" in line for line in warnings(facts(single)))
    uneven = demo_record(timings=demo_record().timings.model_copy(update={"step_s": [1.0, 5.0, 9.0]}))
    assert any("differ much" in line for line in warnings(facts(uneven)))


def shared(**changes: Any) -> Facts:
    record = demo_record(
        trainer=trainer_facts(per_device_train_batch_size=8, **changes),
        tokens=token_facts(prompt=spread(300, 300, 300), completion=spread(60, 60, 60)),
        images=image_facts(decodes_per_image=4.0, processings_per_image=16.0),
    )
    return facts(record)


def test_speed_ups_share_the_prompt_of_a_micro_batch_and_read_images_once() -> None:
    found = speedups.speed_ups(shared())
    assert changes(found) == {"speedups": "auto"} and found is not None and found.kind == "exact"
    tokens_left = (300 + 8 * 60) / (8 * 360)
    passes_s = 0.9 + 0.7 + 1.6
    assert found.saving_s == pytest.approx((1 - tokens_left) * passes_s + 0.3 * 3 / 4 + 0.25 * 15 / 16, rel=1e-6)


def test_speed_ups_that_cannot_share_the_prompt_still_read_images_once() -> None:
    for change in ({"peft": {"lora_dropout": 0.1}}, {"attn_implementation": "eager"}):
        found = speedups.speed_ups(shared(**change))
        assert found is not None and found.stages == ("data", "prompt")
        assert found.saving_s == pytest.approx(0.3 * 3 / 4 + 0.25 * 15 / 16, rel=1e-6)


def test_speed_ups_that_are_on_are_not_advised() -> None:
    assert speedups.speed_ups(shared(speedups=["shared_prefix"])) is None
    asked = replace(shared(), config={"speedups": "auto"})
    assert speedups.speed_ups(asked) is None, "none of them fits, and all are asked for"
    assert speedups.speed_ups(replace(asked, config={"speedups": "none"})) is not None
