"""Each rule of the verdict against numbers worked out by hand, and the ranking."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.advice import learning, observed, remote
from grpo_autotune.advice.bound import bound, warnings
from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.advice.judge import advice_of, amdahl, judge
from grpo_autotune.advice.sentences import knob_ideas
from grpo_autotune.probe.breakdown import Limit, break_down
from grpo_autotune.records.probe import (
    DeviceMemory,
    ProbeRecord,
    ProfiledStep,
    RankTimings,
    ResampleFacts,
    RewardCall,
    StageKernels,
    StageRow,
    StageTimings,
    Utilisation,
)
from grpo_autotune.records.report import Change
from grpo_autotune.registry import names
from tests.support.sample_records import (
    CPU_MACHINE,
    GPU_MACHINE,
    config_of,
    demo_record,
    image_facts,
    judged_record,
    remote_calls,
    spread,
    timings,
    token_facts,
    trainer_facts,
    two_rank_record,
    vllm_record,
)

MICRO = "grpo.per_device_train_batch_size"
LIMITS = {
    "generation": Limit(0.04, "memory"),
    "backward": Limit(0.35, "matrix"),
    "policy_logprob": Limit(0.30, "matrix"),
    "reference_logprob": Limit(0.30, "matrix"),
}


def facts(record: ProbeRecord | None = None, sections: dict[str, Any] | None = None, **more: Any) -> Facts:
    """A probe's facts; `sections` change its configuration, which is left out where `config` is None."""
    record = record or demo_record()
    config = None if "config" in more else config_of(record, **(sections or {}))
    plain: dict[str, Any] = {"limits": LIMITS, "machine": CPU_MACHINE, "config": config}
    return Facts(record=record, breakdown=break_down(record.timings), **plain | more)


def of_knob(f: Facts, key: str) -> Idea | None:
    """The idea about a knob of the table."""
    return next((idea for idea in knob_ideas(f) if key in {change.key for change in idea.changes}), None)


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


def profiled(generation_s: float, passes_s: float) -> ProfiledStep:
    """A step's kernels: busy seconds of a generation of 20 s, and of the backward pass of 6 s."""
    rows = (("generation", 20.0, generation_s, 300_000), ("backward", 6.0, passes_s, 96_000))
    stages = [StageKernels(stage=a, seconds=b, busy_s=c, kernels=d, launches=d) for a, b, c, d in rows]
    return ProfiledStep(step=2, micro_batches=8, tokens=100, stages=stages)


# knobs of the table


def test_a_larger_micro_batch_saves_what_calls_cost() -> None:
    idea = of_knob(facts(), MICRO)
    assert changes(idea) == {MICRO: 16, "grpo.gradient_accumulation_steps": 1}
    assert idea and idea.kind == "exact" and 0.0 < (idea.saving_s or 0.0) < 0.2 * (0.9 + 0.7 + 1.6) + 0.3
    assert "8 times fewer calls" in idea.because and "60% busy" in idea.because
    assert "policy_logprob 900 ms -> 842 ms" in idea.because, "the models' seconds by stage"


def test_a_gpu_is_busy_where_a_kernel_runs_and_not_where_nvml_saw_one() -> None:
    seen = facts(on_gpu())
    assert seen.busy_share("backward") is None, "NVML's 90 % say nothing"
    idea = of_knob(facts(on_gpu(profiled=profiled(6.0, 2.4))), MICRO)
    assert idea and "the device is 40% busy in these passes, which take 12 000 kernels per micro batch" in idea.because
    works = of_knob(facts(on_gpu(profiled=profiled(6.0, 5.7))), MICRO)
    assert idea.saving_s and works and works.saving_s and idea.saving_s > 1.5 * works.saving_s


def test_launches_bind_a_stage_in_which_the_gpu_waits_for_the_host() -> None:
    waits = facts(on_gpu(profiled=profiled(6.0, 2.4)))
    assert bound(waits).endswith(
        "It runs at 4.0% of this machine's memory bandwidth. Launches bind it: a kernel runs in 30% of its time, and "
        "the GPU waits for the host in the rest (3 000 kernels per token)."
    )
    works = bound(facts(on_gpu(profiled=profiled(18.0, 2.4)), limits={}))
    assert works == "Generation bounds the step: 69% of 29.1 s. A kernel runs in 90% of its time."


def test_slow_steps_are_counted_and_said() -> None:
    record = demo_record()
    times = record.timings.model_copy(update={"step_s": [1.0, 1.0, 3.2], "cycle": 1})
    slow = facts(record.model_copy(update={"timings": times}))
    assert slow.breakdown.slow_steps == 1 and slow.breakdown.slowest == 3.2
    assert any(
        "1 of 3 measured steps took more than 1.5 times the median, the slowest 3.2" in w for w in warnings(slow)
    )
    assert not any("times the median" in line for line in warnings(facts()))


def test_ranks_share_the_cores() -> None:
    assert facts().busy_share("backward") == pytest.approx(0.6)
    two, wide = demo_record(trainer=trainer_facts(world_size=2)), CPU_MACHINE.model_copy(update={"cores": 8})
    assert facts(two, machine=wide).busy_share("backward") == pytest.approx(0.6)
    assert facts(machine=None).busy_share("backward") is None


@pytest.mark.parametrize(
    ("trainer", "grpo", "word"),
    [
        ({"loss_type": "bnpo"}, {}, "bnpo"),
        ({}, {"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({}, {"entropy_coef": 0.01}, "entropy bonus"),
    ],
)
def test_a_micro_batch_changes_learning_where_the_loss_depends_on_the_split(
    trainer: dict[str, Any], grpo: dict[str, Any], word: str
) -> None:
    idea = of_knob(facts(demo_record(trainer=trainer_facts(**trainer)), {"grpo": grpo}), MICRO)
    assert idea and idea.kind == "learning" and word in idea.caveat


def test_a_micro_batch_grows_only_as_far_as_memory_and_accumulation_allow() -> None:
    large = vllm_record()
    assert of_knob(facts(large, machine=GPU_MACHINE), MICRO) is not None
    single = trainer_facts(gradient_accumulation_steps=1, per_device_train_batch_size=16, steps_per_generation=1)
    idea = of_knob(facts(demo_record(trainer=single)), MICRO)
    assert idea is None or (idea.saving_s or 0.0) <= 0.0
    assert of_knob(facts(machine=None), MICRO) is None


def test_checkpointing_off_saves_one_forward_of_backward_and_costs_memory() -> None:
    idea = of_knob(facts(vllm_record(), machine=GPU_MACHINE), "grpo.gradient_checkpointing")
    assert idea and idea.stages == ("backward",) and idea.kind == "exact"
    assert idea.saving_s == pytest.approx(11.0 / 4, rel=0.1), "of the four forwards that a backward pass costs with it"
    assert "GiB more memory (predicted), and 40.0 GiB is free" in idea.caveat


def test_loader_workers_hide_loading_on_idle_cores() -> None:
    idea = of_knob(facts(), "grpo.dataloader_num_workers")
    assert changes(idea) == {"grpo.dataloader_num_workers": 1}
    assert idea and idea.saving_s == pytest.approx(0.3 * (1 - 0.6)) and "cores that are 60% busy" in idea.because
    assert of_knob(facts(machine=CPU_MACHINE.model_copy(update={"cores": 1})), "grpo.dataloader_num_workers") is None


def test_loader_workers_cannot_hide_more_than_the_rest_of_the_step() -> None:
    record = on_gpu(timings=timings({"data": 12.0, "backward": 1.0}, {("data", "load"): 12.0}))
    idea = of_knob(facts(record, machine=GPU_MACHINE), "grpo.dataloader_num_workers")
    assert changes(idea) == {"grpo.dataloader_num_workers": 4}
    assert idea and idea.saving_s == pytest.approx(12.0 - (12.0 / 4 - 1.0), rel=0.05)


def test_a_knob_without_words_of_its_own_says_what_turning_it_does() -> None:
    idea = of_knob(facts(vllm_record(), {"vllm": {"max_num_seqs": 4}}, machine=GPU_MACHINE), "vllm.max_num_seqs")
    assert changes(idea) == {"vllm.max_num_seqs": 16} and idea and idea.stages == ("generation",)
    assert (
        idea.because.startswith("Completions that are generated at once: ") and "generation 9.00 s -> " in idea.because
    )


@pytest.mark.parametrize(("share", "fits"), [(0.4, True), (0.99, False)])
def test_sleep_mode_goes_where_engine_and_trainer_fit_together(share: float, fits: bool) -> None:
    engine = {"enable_sleep_mode": True, "gpu_memory_utilization": share}
    idea = of_knob(facts(vllm_record(), {"vllm": engine}, machine=GPU_MACHINE), "vllm.enable_sleep_mode")
    assert (idea is not None) is fits
    assert idea is None or idea.saving_s == pytest.approx(1.0)


def test_beta_zero_saves_the_reference_pass() -> None:
    idea = of_knob(facts(), "grpo.beta")
    assert changes(idea) == {"grpo.beta": 0.0}
    assert idea and idea.kind == "learning" and idea.saving_s == pytest.approx(0.7, rel=0.05)
    assert idea.stages == ("reference_logprob",)
    assert of_knob(facts(vllm_record(), machine=GPU_MACHINE), "grpo.beta") is None


# what follows from the record alone


def test_a_waiting_reward_is_made_asynchronous() -> None:
    idea = observed.waiting_reward(facts(vllm_record()))
    assert idea and "judge" in idea.action
    assert idea.saving_s == pytest.approx(4.0 * (1 - 0.04) * (1 - 1 / 16))


def test_a_computing_or_asynchronous_reward_is_left_alone() -> None:
    busy = [Utilisation(stage="reward", samples=20, cpu_percent=98.0)]
    assert observed.waiting_reward(facts(vllm_record(utilisation=busy))) is None
    awaited = [RewardCall(name="judge", is_async=True, calls=3, mean_s=4.0, max_s=6.0)]
    assert observed.waiting_reward(facts(vllm_record(rewards=awaited))) is None


def test_the_straggler_is_named_with_its_stage() -> None:
    idea = observed.straggler(facts(two_rank_record()))
    assert idea and "rank 1" in idea.action and "generation" in idea.because
    assert idea.saving_s == pytest.approx(0.8)
    assert observed.straggler(facts()) is None


def three_ranks(rank: int) -> Facts:
    """Ranks that work for 1, 4 and 2 seconds of a step of 4, seen from one of them."""
    work = (1.0, 4.0, 2.0)
    rows = [RankTimings(rank=r, step_s=4.0, stages={"backward": s, "sync_wait": 4.0 - s}) for r, s in enumerate(work)]
    seen = timings({"backward": work[rank], "sync_wait": 4.0 - work[rank]})
    return facts(demo_record(ranks=rows, rank=rank, timings=seen))


def test_three_ranks_are_compared_with_the_mean_of_the_others() -> None:
    idea = observed.straggler(three_ranks(0))
    assert idea and "rank 1" in idea.action and idea.stages == ("sync_wait",)
    assert idea.saving_s == pytest.approx(4.0 - 1.5)


def test_seen_from_the_slowest_rank_the_saving_is_in_its_own_stage() -> None:
    idea = observed.straggler(three_ranks(1))
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
    f = facts(rare("evaluate", [0.0, 0.0, 10.0, 0.0]), sections={"grpo": {"eval_steps": 50}})
    idea = observed.log_save_eval(f)
    assert changes(idea) == {"grpo.eval_steps": 100}
    scale = 2.0 / ((4 * 2.0 + 10.0) / 4)  # the median step over the mean
    assert idea and idea.saving_s == pytest.approx(10.0 / 50 / 2 * scale)


def test_the_distance_between_evaluations_is_read_from_the_steps_without_a_configuration() -> None:
    twice = observed.log_save_eval(facts(rare("evaluate", [0.0, 4.0, 0.0, 4.0, 0.0]), config=None))
    assert twice and not twice.changes and "eval_steps" in twice.action
    assert twice.saving_s == pytest.approx(4.0 / 2 / 2 * 2.0 / (2.0 + 8.0 / 5))
    assert observed.log_save_eval(facts(rare("evaluate", [0.0, 4.0, 0.0, 0.0]), config=None)) is None


def test_logging_is_counted_at_its_own_steps() -> None:
    # Steps 8 to 11, logged at step 10; the others hold the look whether to log.
    record = rare("log", [1e-5, 1e-5, 2.0, 1e-5])
    idea = observed.log_save_eval(facts(record, sections={"grpo": {"logging_steps": 5}}))
    assert changes(idea) == {"grpo.logging_steps": 10}
    assert idea and idea.saving_s == pytest.approx(2.0 / 5 / 2 * 2.0 / (2.0 + 2.0 / 4), rel=1e-4)
    for settings_of_log in ({}, {"logging_steps": 20}, {"logging_steps": 5, "logging_strategy": "epoch"}):
        assert observed.log_save_eval(facts(record, {"grpo": settings_of_log})) is None


# learning


def test_image_size_takes_the_largest_size_that_halves_the_tokens() -> None:
    big = image_facts(tokens=spread(1024, 1024, 1024), pixels=spread(1024**2, 1024**2, 1024**2))
    record = demo_record(images=big, tokens=token_facts(prompt=spread(1100, 1100, 1100)))
    idea = learning.image_size(facts(record))
    assert changes(idea) == {"data.image_size": 640}
    assert idea and "400 tokens instead of 1 024" in idea.because and (idea.saving_s or 0.0) > 0.3 * 5.04
    small = learning.image_size(facts(sections={"data": {"image_size": 384}}))
    assert changes(small) == {"data.image_size": 224}
    assert learning.image_size(facts(demo_record(images=None))) is None


def test_images_larger_than_the_model_sees_are_resized_once() -> None:
    large = image_facts(pixels=spread(10**6, 10**6, 10**6))
    idea = learning.oversized_images(facts(demo_record(images=large)))
    assert changes(idea) == {"data.image_size": 384}
    assert idea and 0.0 < (idea.saving_s or 0.0) < 0.25 + 0.3 and set(idea.stages) <= {"data", "prompt"}
    assert learning.oversized_images(facts()) is None


def many_generations(**changes: Any) -> ProbeRecord:
    big = trainer_facts(
        num_generations=32,
        gradient_accumulation_steps=16,
        steps_per_generation=16,
        generation_batch_size=32,
        beta=0.0,
    )
    slow = timings(
        {"generation": 0.4, "policy_logprob": 4.0, "backward": 5.0}, {("policy_logprob", "training_forward"): 4.0}
    )
    return demo_record(trainer=big, timings=slow, **changes)


@pytest.mark.parametrize("given", [{}, {"steps_per_generation": 16}, {"generation_batch_size": 32}])
def test_half_the_generations_of_as_many_prompts(given: dict[str, Any]) -> None:
    idea = learning.fewer_generations(facts(many_generations(), {"grpo": given}))
    changed = changes(idea)
    assert changed["grpo.num_generations"] == 16 and changed["grpo.gradient_accumulation_steps"] == 8
    assert {key for key in changed if "generation" in key} == {"grpo.num_generations", *(f"grpo.{k}" for k in given)}
    assert idea and idea.saving_s == pytest.approx(9.4 / 2, rel=0.1)


def test_fewer_generations_only_where_useful_completions_keep_up() -> None:
    assert learning.fewer_generations(facts()) is None
    dead = token_facts(groups=20, dead_groups=19, pass_rates=[0.0] * 19 + [0.03125])
    assert learning.fewer_generations(facts(many_generations(tokens=dead))) is None


def test_a_long_tail_is_capped_at_the_ninetieth_percentile() -> None:
    idea = learning.long_tail(facts(vllm_record(), machine=GPU_MACHINE))
    assert changes(idea) == {"grpo.max_completion_length": 504}
    assert idea and 3.0 < (idea.saving_s or 0.0) < 17.0
    assert learning.long_tail(facts()) is None


def test_vllm_is_advised_without_a_number_that_nobody_knows() -> None:
    idea = learning.use_vllm(facts(on_gpu(), machine=GPU_MACHINE))
    assert idea and "`generate` runs at 4.0% of what this GPU can do" in idea.because
    assert changes(idea) == {"grpo.use_vllm": True} and "not predicted" in idea.because
    assert learning.use_vllm(facts()) is None
    unknown = learning.use_vllm(facts(on_gpu(), machine=GPU_MACHINE, limits={}))
    assert unknown and "launches each kernel of each token" in unknown.because
    good = LIMITS | {"generation": Limit(0.6, "memory")}
    assert learning.use_vllm(facts(on_gpu(), machine=GPU_MACHINE, limits=good)) is None


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


def test_what_teaches_nothing_says_how_much_of_a_step_it_took() -> None:
    paid_s = 1.2 + 0.9 + 0.7 + 0.01 + 1.6 + 0.25  # every stage whose work goes by rows
    half = demo_record(tokens=token_facts(truncated_share=0.5), trainer=trainer_facts(mask_truncated_completions=True))
    cut = learning.truncated(facts(half))
    assert cut and f"masked: {paid_s / 2:.2f} s of a step (46%) for nothing" in cut.because
    dead = token_facts(dead_groups=20, pass_rates=[0.0] * 20)
    idea = learning.dead_groups(facts(demo_record(tokens=dead)))
    assert idea and f"{paid_s:.2f} s of a step (92%) for nothing" in idea.because
    skipped = demo_record(tokens=dead, trainer=trainer_facts(speedups=["skip_dead"]))
    idea = learning.dead_groups(facts(skipped))
    assert idea and f"{1.2 + 0.01 + 0.25:.2f} s of a step" in idea.because


def test_a_zero_gradient_is_said_where_nothing_else_explains_it() -> None:
    idea = learning.no_gradient(facts(demo_record(zero_gradients=3, zero_unexplained=3)))
    assert idea and "In 3 of 3 steps the gradient was zero, 4.66 s of a step (92%) for nothing" in idea.because
    dead = token_facts(dead_groups=20, pass_rates=[0.0] * 20)
    for known in (demo_record(), demo_record(zero_gradients=3, tokens=dead)):
        assert learning.no_gradient(facts(known)) is None
    frozen = demo_record(zero_gradients=2, zero_unexplained=2, tokens=token_facts(dead_groups=14, groups=20))
    assert learning.no_gradient(facts(frozen)) is not None  # of several groups a step few steps are dead as a whole


def test_the_best_checkpoint_needs_an_evaluation() -> None:
    (advice,) = [a for a in judge(facts(sections={"grpo": {"save_strategy": "best"}})) if "save_strategy" in a.text]
    assert advice.kind == "exact" and "set one of them to steps" in advice.text
    evaluated = {"grpo": {"save_strategy": "best", "eval_strategy": "steps"}, "data": {"eval_split": "test"}}
    assert learning.saves_nothing(facts(sections=evaluated)) is None


def dropped(**changes: Any) -> Facts:
    reason = "peft.lora_dropout is 0.05: TRL draws other numbers"
    off = {"shared_prefix": reason, "shared_prefill": reason, "vision_cache": "the tower is trained"}
    adapter = {"peft_type": "LORA", "r": 8, "lora_dropout": 0.05}
    trainer = trainer_facts(per_device_train_batch_size=8, peft=adapter, speedups_off=off)
    record = demo_record(trainer=trainer, tokens=token_facts(prompt=spread(300, 300, 300)))
    return facts(record, {"speedups": "auto", "grpo": {"max_steps": 10, **changes}})


def test_lora_dropout_costs_what_the_same_run_without_it_would_save() -> None:
    f = dropped()
    idea = learning.lora_dropout(f)
    assert idea and idea.kind == "learning" and changes(idea) == {"grpo.disable_dropout": True}
    assert "peft.lora_dropout keeps shared_prefix and shared_prefill off" in idea.because
    assert f.models is not None and f.base is not None
    without = f.base.model_copy(update={"grpo": f.base.grpo | {"disable_dropout": True}})
    assert idea.saving_s == pytest.approx(f.models.step_s(f.base).value - f.models.step_s(without).value)
    assert (idea.saving_s or 0.0) > 1.0 and {"generation", "backward"} <= set(idea.stages)
    (advice,) = [a for a in judge(f) if "lora_dropout" in a.text]
    assert "changes learning" in advice.text and advice.predicted_saving == idea.saving_s
    assert "not exact" in idea.caveat
    assert learning.lora_dropout(facts()) is None
    one_mask = f.base.model_copy(update={"speedups": [{"name": "shared_prefix", "dropout": "shared"}]})
    own = f.base.model_copy(update={"speedups": ["shared_prefix"]})
    assert f.models.step_s(one_mask).value < f.models.step_s(own).value


# ranking and words


def test_small_savings_stay_silent_and_exact_comes_first() -> None:
    def idea(kind: Any, saving: float | None) -> Idea:
        return Idea(kind=kind, stages=("reward",), because="x", action="y", saving_s=saving)

    ideas = [idea("learning", 2.0), idea("exact", 0.04), idea("exact", 0.3), idea("learning", None), idea("exact", 0.9)]
    kept = [(a.kind, a.predicted_saving) for a in judge(facts(), ideas)]
    assert kept == [("exact", 0.9), ("exact", 0.3), ("learning", 2.0), ("learning", None)]


def test_amdahl() -> None:
    share = 1.6 / 5.04
    assert amdahl(facts(), ["backward"]) == pytest.approx(1 / (1 - share))
    alone = demo_record(timings=timings({"backward": 1.0}))
    assert amdahl(facts(alone), ["backward"]) is None


@pytest.mark.parametrize("record", [demo_record(), vllm_record(), two_rank_record(), on_gpu()])
@pytest.mark.parametrize("machine", [CPU_MACHINE, GPU_MACHINE, None])
@pytest.mark.parametrize("limits", [LIMITS, {}])
@pytest.mark.parametrize("more", [{}, {"config": None}])
def test_every_advice_is_a_prediction_within_the_step(
    record: ProbeRecord, machine: Any, limits: Any, more: Any
) -> None:
    f = facts(record, machine=machine, limits=limits, **more)
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
    memory = {"allocated_bytes": 1, "reserved_bytes": 2, "outside_bytes": 0, "device_bytes": 3, "failures": 0}
    full = demo_record().model_copy(update={"device_memory": DeviceMemory(**memory, retries=7)})
    assert any("was full 7 times" in line for line in warnings(facts(full)))


def shared(**changes: Any) -> Facts:
    record = demo_record(
        trainer=trainer_facts(per_device_train_batch_size=8, **changes),
        tokens=token_facts(prompt=spread(300, 300, 300), completion=spread(60, 60, 60)),
        images=image_facts(decodes_per_image=4.0, processings_per_image=16.0),
    )
    kernel = changes.get("attn_implementation")
    return facts(record, {"model": {"name_or_path": "m", "attn_implementation": kernel}})


def test_speed_ups_share_the_prompt_of_a_micro_batch_and_read_images_once() -> None:
    idea = of_knob(shared(), "speedups")
    assert changes(idea) == {"speedups": "auto"} and idea is not None and idea.kind == "exact"
    tokens_left = (300 + 8 * 60) / (8 * 360)
    assert f"{100 * (1 - tokens_left):.0f}% of what the log-prob and backward passes" in idea.because
    assert "decoded 4 times" in idea.because and {"data", "backward"} <= set(idea.stages)


def test_speed_ups_that_cannot_share_the_prompt_still_read_images_once() -> None:
    for change in ({"peft": {"r": 8, "lora_dropout": 0.1}}, {"attn_implementation": "eager"}):
        idea = of_knob(shared(**change), "speedups")
        assert idea is not None and "data" in idea.stages and "backward" not in idea.stages
        assert "share a micro batch" not in idea.because


def test_speed_ups_of_a_script_are_a_call() -> None:
    plain = facts(config=None)
    (call,) = [idea for idea in knob_ideas(plain) if "speed_up" in idea.action]
    assert call.changes == () and (call.saving_s or 0.0) > 0.5
    fast = facts(demo_record(trainer=trainer_facts(speedups=names("speedup"))), config=None)
    assert not [a for a in judge(fast) if "speed_up(" in a.text], "they are on"


# rewards over a network


def judged(record: ProbeRecord, *, concurrency: int | None = 4, **sections: Any) -> Facts:
    return facts(record, {"rewards": [{"name": "exact_match", "concurrency": concurrency}], **sections})


def test_a_judge_that_bounds_the_step_is_asked_more_at_once() -> None:
    idea = of_knob(judged(judged_record()), "rewards.0.concurrency")
    assert changes(idea) == {"rewards.0.concurrency": 16}
    assert idea and idea.kind == "exact" and idea.stages == ("reward",) and (idea.saving_s or 0.0) > 2.0
    assert idea.because.startswith("judge takes 2.50 s per call at p95, and a batch 5.50 s with 4 at once; with 16 at")
    assert "reward 5.50 s -> " in idea.because
    limited = of_knob(judged(judged_record(remote_calls(rate_limited=2))), "rewards.0.concurrency")
    assert limited is None or (limited.saving_s or 0.0) < 0.0, "half as many at once saves nothing"
    assert of_knob(facts(), "rewards.0.concurrency") is None, "nobody asks a network"


def test_a_service_is_slow_where_no_more_calls_at_once_help() -> None:
    slow = remote_calls(name="service", kind="service", concurrency=16, batch_s=9.0)
    record = judged_record(slow, trainer=trainer_facts(speedups=["reward_overlap"]))
    idea = remote.slow_reward(judged(record, concurrency=16))
    assert idea and idea.action.startswith("make service answer sooner") and idea.saving_s == pytest.approx(1.5)
    assert not idea.caveat
    plain = remote.slow_reward(judged(judged_record(slow), concurrency=16))
    assert plain and plain.caveat == "The speed-up reward_overlap can hide it behind 700 ms of log-probs"
    assert remote.slow_reward(judged(judged_record())) is None, "more at once would help, and the knob says so"
    assert remote.slow_reward(facts(demo_record(remote=[slow]))) is None, "the step hardly waits"
    assert remote.slow_reward(facts()) is None


def test_rows_from_a_cache_and_rows_without_a_score_are_warned_of() -> None:
    cached = remote_calls(cache_hits=36, calls=12, batch_s=3.0)
    failing = remote_calls(failures={"timeout": 4, "schema": 2})
    lines = list(remote.remote_warnings(judged(judged_record(cached, failing))))
    assert lines[0].startswith("75% of the rows of judge came from its cache: without, ")
    assert lines[1] == "12% of the rows of judge got no score (timeout 4 and schema 2)."
    assert not list(remote.remote_warnings(judged(judged_record())))
    assert lines[0] in warnings(judged(judged_record(cached)))


def test_the_cost_of_dynamic_sampling() -> None:
    once = ResampleFacts(rollouts=4, rounds=4, groups=8)
    assert warnings(facts(demo_record(resample=once))) == []
    often = once.model_copy(update={"rounds": 10, "dead_groups": 2, "further_s": 6.0})
    (line,) = warnings(facts(demo_record(resample=often)))
    assert "2.5 generations per rollout" in line and "take 1.50 s per rollout, 30% of its steps" in line
    assert "6.2% of the groups trained on have equal rewards nevertheless" in line
