"""EasyR1's settings as a RunConfig, under its names of today and those of early 2025."""

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.translation import nested
from grpo_autotune.records.imported import Imported
from tests.support.imported import row, source, translated, value_at

ACTOR, ROLLOUT, LORA = "worker.actor.", "worker.rollout.", "worker.actor.model.lora."
BASE = {
    "data.train_files": "org/geometry@train", "data.val_files": "org/geometry@test", "data.rollout_batch_size": 512,
    f"{ACTOR}global_batch_size": 128, f"{ACTOR}micro_batch_size_per_device_for_update": 1, f"{ROLLOUT}n": 5,
    "worker.reward.reward_function": "own.py:score", f"{ACTOR}model.model_path": "org/model",
}  # fmt: skip
EARLY = {
    "algorithm.adv_estimator": "grpo", f"{ACTOR}use_kl_loss": True, f"{ACTOR}kl_loss_coef": 0.02,
    "trainer.total_episodes": 3, "trainer.test_freq": 5,
}  # fmt: skip


def imported(values: dict[str, Any], version: str | None = None) -> Imported:
    """The outcome for BASE with these settings, which a RunConfig takes."""
    outcome = translated(source("easyr1", BASE | values), version).finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(outcome.world_size))
        RunConfig.from_dict(outcome.config)
    return outcome


def test_the_batch_of_the_shipped_example() -> None:
    outcome = imported({})
    grpo = outcome.config["grpo"]
    keys = ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    assert [grpo[key] for key in keys] == [5, 1, 80, 320]
    assert (outcome.world_size, outcome.numbers["P"], outcome.steps_per_rollout) == (8, 512, 4)


KL = {"algorithm.use_kl_loss": True, "algorithm.kl_penalty": "low_var_kl", "algorithm.kl_coef": 0.01}


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        (KL, "grpo.beta", 0.01),
        (KL, "grpo.use_bias_correction_kl", False),
        (KL | {"algorithm.disable_kl": True}, "grpo.beta", 0.0),
        ({}, "grpo.beta", None),
        ({}, "grpo.epsilon_high", 0.3),
        ({}, "grpo.delta", 3.0),
        ({f"{ACTOR}loss_type": "gspo_token"}, "grpo.importance_sampling_level", "sequence"),
        ({f"{ACTOR}loss_type": "gspo_token"}, "grpo.delta", 3.0),
        ({f"{ACTOR}loss_type": "cispo", f"{ACTOR}clip_ratio_high": 4}, "grpo.epsilon_high", 5),
        ({f"{ACTOR}loss_type": "sapo", f"{ACTOR}tau_negative": 1.1}, "grpo.sapo_temperature_neg", 1.1),
        ({f"{ACTOR}loss_avg_mode": "seq"}, "grpo.loss_type", "grpo"),
        ({"trainer.val_freq": 5}, "grpo.eval_steps", 20),
        ({"trainer.val_freq": 5}, "data.eval_split", "test"),
        ({"trainer.val_freq": 5, f"{ROLLOUT}val_override_config.temperature": 0.6}, "eval_sampling.temperature", 0.6),
        ({"trainer.val_freq": 5, f"{ROLLOUT}val_override_config.top_k": -1}, "eval_sampling.top_k", 0),
        ({"trainer.save_limit": 3}, "grpo.save_total_limit", 3),
        ({}, "grpo.seed", 1),
        ({}, "data.split", "train"),
        ({}, "data.min_pixels", 262144),
        ({"data.answer_key": "solution"}, "data.columns.ground_truth", "solution"),
        ({"data.prompt_key": "problem"}, "data.columns.prompt", "problem"),
        ({f"{LORA}rank": 16, f"{LORA}target_modules": "q_proj, v_proj"}, "peft.target_modules", ["q_proj", "v_proj"]),
        ({f"{LORA}rank": 16, f"{LORA}exclude_modules": ".*visual.*"}, "peft.exclude_modules", ".*visual.*"),
        ({f"{ACTOR}fsdp.torch_dtype": "bf16"}, "model.dtype", "bfloat16"),
        ({f"{ROLLOUT}limit_images": 2}, "vllm.limit_mm_per_prompt.image", 2),
        ({}, "vllm.sleep_level", 1),
        ({"algorithm.online_filtering": True, "trainer.max_try_make_batch": 6}, "resample.max_rounds", 6),
        ({"algorithm.online_filtering": True, "trainer.max_try_make_batch": -1}, "resample.max_rounds", 10),
        ({"algorithm.online_filtering": True, "data.mini_rollout_batch_size": 128}, "resample.max_rounds", 5),
        ({}, "grpo.vllm_importance_sampling_correction", False),
        ({"trainer.val_freq": 5}, "eval_sampling", None),
        ({f"{ACTOR}optim.warmup_style": "cosine"}, "grpo.lr_scheduler_type", "cosine"),
    ],
)
def test_a_setting_as_trl_has_it(values: dict[str, Any], path: str, expected: Any) -> None:
    assert value_at(imported(values).config, path) == expected


def test_kl_in_the_reward_is_lost_by_default_and_said() -> None:
    lost = row(imported({}), "algorithm.use_kl_loss")
    assert lost.kind == "none" and "weight 0.001" in lost.why


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({f"{ACTOR}loss_type": "cispo", f"{ACTOR}clip_ratio_low": 0}, f"{ACTOR}clip_ratio_low"),
        ({f"{ACTOR}loss_type": "sapo"}, f"{ACTOR}loss_avg_mode"),
        ({f"{ACTOR}optim.strategy": "adamw_bf16"}, f"{ACTOR}optim.strategy"),
        (KL | {"algorithm.kl_penalty": "mse"}, "algorithm.kl_penalty"),
    ],
)
def test_what_changes_meaning(values: dict[str, Any], key: str) -> None:
    assert row(imported(values), key).kind == "changes"


def test_a_built_in_reward_of_early_2025() -> None:
    outcome = imported(EARLY | {"worker.reward.reward_function": None, "worker.reward.compute_score": "math"})
    assert row(outcome, "worker.reward.compute_score").kind == "changes"


def test_names_and_defaults_of_early_2025() -> None:
    outcome = imported(EARLY)
    grpo = outcome.config["grpo"]
    assert (outcome.version, grpo["beta"], grpo["num_train_epochs"], grpo["eval_steps"]) == ("2025.2", 0.02, 3, 20)
    found = (grpo["loss_type"], grpo["entropy_coef"], grpo["epsilon_high"], "delta" in grpo)
    assert found == ("bnpo", 1e-3, 0.2, False)


SAMPLED = {f"{ROLLOUT}val_override_config.n": 1}


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({}, "eval_sampling.temperature", 0),
        (SAMPLED, "eval_sampling", None),
        (SAMPLED, "grpo.entropy_coef", None),
        ({"trainer.test_freq": None, "trainer.val_freq": 2}, "grpo.eval_steps", 8),
        ({f"{ACTOR}optim.lr_warmup_ratio": 0.1}, "grpo.warmup_steps", 0.1),
        (KL, "grpo.beta", 0.01),
    ],
)
def test_names_that_came_in_spring_2025(values: dict[str, Any], path: str, expected: Any) -> None:
    given = {key: value for key, value in (EARLY | values).items() if value is not None}
    assert value_at(imported(given, "2025.2").config, path) == expected


@pytest.mark.parametrize(
    ("values", "version", "loss"),
    [
        ({"worker.reward.reward_type": "batch"}, "2025.6", "bnpo"),
        ({"worker.reward.reward_type": "sequential", f"{ACTOR}dynamic_batching": True}, "2026.7", "dapo"),
    ],
)
def test_each_micro_batch_had_its_own_mean_up_to_july_2025(values: dict[str, Any], version: str, loss: str) -> None:
    outcome = imported(values)
    assert (outcome.version, outcome.config["grpo"]["loss_type"]) == (version, loss)
    style = "easyr1_each" if values["worker.reward.reward_type"] == "sequential" else "easyr1"
    assert [*outcome.files] == [f"{style}_score.py"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm.adv_estimator": "reinforce_plus_plus"}, "advantages by reinforce_plus_plus"),
        ({"worker.reward.reward_function": None}, "no file of a reward function"),
        ({f"{ROLLOUT}n": 1}, "one completion a prompt"),
        ({f"{ACTOR}ulysses_size": 3}, "8 GPUs cannot be divided"),
        ({f"{ACTOR}model.model_path": ""}, "line 1: worker.actor.model.model_path: it is empty"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translated(source("easyr1", BASE | values)).finished()


def test_the_json_that_a_run_leaves_with_a_template_and_a_reward_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(rewards):\n    return [{'overall': 1.0} for _ in rewards]\n")
    (tmp_path / "ask.jinja").write_text("{{ content }} Think first.")
    file = tmp_path / "experiment_config.json"
    file.write_text(json.dumps(nested(BASE | {"data.format_prompt": "./ask.jinja", "data.prompt_key": "problem"})))
    outcome = import_file(file).finished()
    data = outcome.config["data"]
    assert Path(data["prompt_template"]) == tmp_path / "ask.jinja" and data["columns"]["content"] == "problem"
    assert str(tmp_path / "own.py") in outcome.files["easyr1_score.py"]


@pytest.mark.parametrize("section", ["trainer", "worker.rollout", "worker.reward", "worker.actor"])
def test_a_key_that_nobody_knows_is_said(section: str) -> None:
    assert row(imported({f"{section}.unheard_of": 3}), f"{section}.unheard_of").kind == "none"
