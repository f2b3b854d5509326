"""Six numbers, written as each framework writes them, come out as TRL's own arithmetic has them."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.config.batch import BatchPlan, batch_plan
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import easyr1, verl
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import SixNumbers, Translation
from tests.support.imported import source

ACTOR, ROLLOUT, EASY = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "worker.actor."


def as_verl(batch: SixNumbers) -> Source:
    """verl counts prompts; so does EasyR1."""
    values = {
        "algorithm.adv_estimator": "grpo", "data.train_batch_size": batch.prompts, f"{ROLLOUT}n": batch.num_generations,
        f"{ACTOR}ppo_mini_batch_size": batch.completions // batch.num_generations, f"{ACTOR}ppo_epochs": batch.passes,
        f"{ACTOR}ppo_micro_batch_size_per_gpu": batch.micro_batch, "trainer.n_gpus_per_node": batch.ranks,
    }  # fmt: skip
    return source("verl", values)


def as_easyr1(batch: SixNumbers) -> Source:
    values = {
        "data.rollout_batch_size": batch.prompts, "worker.rollout.n": batch.num_generations, "data.train_files": "a@b",
        f"{EASY}global_batch_size": batch.completions // batch.num_generations, f"{EASY}ppo_epochs": batch.passes,
        f"{EASY}micro_batch_size_per_device_for_update": batch.micro_batch, "trainer.n_gpus_per_node": batch.ranks,
        "worker.reward.reward_function": "own.py:score", f"{EASY}model.model_path": "m",
    }  # fmt: skip
    return source("easyr1", values)


def in_completions(batch: SixNumbers) -> dict[str, Any]:
    """The keys of TRL, which counts completions, as ms-swift does."""
    return {
        "per_device_train_batch_size": batch.micro_batch, "num_generations": batch.num_generations,
        "gradient_accumulation_steps": batch.completions // batch.ranks // batch.micro_batch,
        "steps_per_generation": batch.rollout // batch.ranks // batch.micro_batch, "num_iterations": batch.passes,
    }  # fmt: skip


def as_trl(batch: SixNumbers) -> Source:
    values = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["think_format_reward"]}
    launch = {"num_processes": Setting(batch.ranks, 1)}
    return source("trl", values | in_completions(batch), hints={"trl": "1.16.0"}, launch=launch)


def as_swift(batch: SixNumbers) -> Source:
    values = {"rlhf_type": "grpo", "model": "m", "dataset": "d", "reward_funcs": ["format"], "use_hf": True}
    environment = {"NPROC_PER_NODE": Setting(batch.ranks, 1)}
    return source("ms-swift", values | in_completions(batch), program="swift rlhf", environment=environment)


FORMS: dict[str, tuple[Callable[[SixNumbers], Source], str]] = {
    "verl": (as_verl, "verl"), "easyr1": (as_easyr1, "easyr1"), "trl": (as_trl, "trl"), "ms-swift": (as_swift, "swift"),
}  # fmt: skip


def translated(framework: str, batch: SixNumbers, world_size: int | None = None) -> Translation:
    make, module = FORMS[framework]
    translation: Translation = import_module(f"grpo_autotune.interop.frameworks.{module}").translate(
        make(batch), None, world_size
    )
    return translation


def plan_of(translation: Translation) -> BatchPlan:
    """TRL's arithmetic on as many processes as the result is for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(translation.world_size))
        return batch_plan(translation.finished().config["grpo"])


@st.composite
def batches(draw: st.DrawFn) -> SixNumbers:
    """Six numbers that every form can say: whole groups in a step, whole steps in a rollout, whole micro batches."""
    group, ranks = draw(st.integers(2, 17)), draw(st.integers(1, 9))
    mini = draw(st.integers(1, 12)) * ranks // math.gcd(group, ranks)
    each = mini * group // ranks
    micro = draw(st.sampled_from([m for m in range(1, each + 1) if each % m == 0]))
    rollouts = draw(st.integers(1, 6))
    return SixNumbers(group, mini * rollouts, mini * group, draw(st.integers(1, 3)), ranks, micro)


@pytest.mark.parametrize("framework", FORMS)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), fewer=st.booleans())
def test_a_batch_is_the_same_in_trl(framework: str, batch: SixNumbers, fewer: bool) -> None:
    ranks = 1 if fewer else batch.ranks
    plan = plan_of(translated(framework, batch, ranks))
    assert plan.completions_per_step == batch.completions
    assert plan.prompts_per_generation == batch.prompts
    assert (plan.num_generations, plan.num_iterations) == (batch.num_generations, batch.passes)
    steps = plan.steps_per_generation * plan.num_iterations / plan.accumulation
    assert steps == batch.prompts * batch.num_generations * batch.passes / batch.completions
    assert plan.micro_batch == batch.micro_batch or ranks != batch.ranks
    assert plan.micro_batch <= batch.micro_batch


ODD = ("$(x)", None, [], "abc", True, -5, 0, 1.5, {}, ["a", "b"], "", float("nan"), 10**12)


@pytest.mark.parametrize(("framework", "defaults"), [("verl", verl.NEWEST), ("easyr1", easyr1.DEFAULTS)])
@settings(max_examples=200, deadline=None)
@given(choice=st.data())
def test_no_value_of_a_setting_ends_in_a_traceback(
    framework: str, defaults: dict[str, Any], choice: st.DataObject
) -> None:
    make, _ = FORMS[framework]
    read = make(SixNumbers(4, 32, 32, 1, 2, 4))
    key = choice.draw(st.sampled_from(sorted({*defaults, *read.settings})))
    odd = dict(read.settings) | {key: Setting(choice.draw(st.sampled_from(ODD)), 1)}
    with contextlib.suppress(ConfigError):
        import_module(f"grpo_autotune.interop.frameworks.{framework}").translate(replace(read, settings=odd)).finished()


def test_what_no_number_of_processes_divides_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"line 1: actor_rollout_ref.rollout.n: the 45 .* among 2 processes"):
        translated("verl", SixNumbers(5, 18, 45, 1, 3, 3), world_size=2).finished()


def test_one_completion_per_prompt_is_refused_by_line() -> None:
    with pytest.raises(ConfigError, match=r"run.sh, line 1: .*: one completion a prompt"):
        translated("verl", SixNumbers(1, 8, 8, 1, 1, 1))


@pytest.mark.parametrize("steps", [0.05, -1])
def test_a_share_of_the_steps_stays(steps: float) -> None:
    assert translated("verl", SixNumbers(4, 32, 32, 2, 2, 4)).steps(steps) == steps


def test_steps_of_rollouts_are_optimizer_steps() -> None:
    assert translated("verl", SixNumbers(4, 32, 32, 2, 2, 4)).steps(10) == 80


@pytest.mark.slow
@pytest.mark.parametrize("framework", FORMS)
def test_trl_itself_agrees(framework: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    batch = SixNumbers(5, 36, 60, 2, 1, 4)
    config = translated(framework, batch, 1).finished().config["grpo"]
    keys = {key: config[key] for key in (*in_completions(batch),) if key in config}
    args = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **keys)
    assert args.generation_batch_size == batch.rollout
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch.completions
    assert args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps == 6
