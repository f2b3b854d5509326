"""verl's settings as a RunConfig: arithmetic of its public scripts, traps, versions, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.source import Setting
from grpo_autotune.records.imported import Imported
from tests.support.imported import row, source, translated, value_at

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}." for name in ("actor", "model", "rollout"))
CORRECTION, FILTER = "algorithm.rollout_correction.", "algorithm.filter_groups."
BASE = {
    "algorithm.adv_estimator": "grpo", "data.train_batch_size": 512, f"{ACTOR}ppo_mini_batch_size": 128,
    f"{ROLLOUT}n": 5, f"{ACTOR}ppo_micro_batch_size_per_gpu": 10, "data.train_files": "train.parquet",
}  # fmt: skip


def imported(values: dict[str, Any], version: str | None = None, world_size: int | None = None) -> Imported:
    """The outcome for BASE with these settings, which a RunConfig takes."""
    outcome = translated(source("verl", BASE | values), version, world_size).finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(outcome.world_size))
        RunConfig.from_dict(outcome.config)
    return outcome


TOKENS = {f"{ACTOR}use_dynamic_bsz": True, "data.max_prompt_length": 1024, "data.max_response_length": 2048,
          f"{ACTOR}ppo_max_token_len_per_gpu": 24576}  # fmt: skip
DAPO = {
    f"{ACTOR}ppo_mini_batch_size": 32, f"{ROLLOUT}n": 16, f"{ACTOR}ulysses_sequence_parallel_size": 8,
    "trainer.nnodes": 16, f"{ACTOR}use_dynamic_bsz": True, f"{ACTOR}ppo_max_token_len_per_gpu": 22528,
    "data.max_prompt_length": 2048, "data.max_response_length": 20480,
}  # fmt: skip
OF_ALL_RANKS = {f"{ACTOR}ppo_micro_batch_size_per_gpu": None, f"{ACTOR}ppo_micro_batch_size": 80}
MEGATRON = {f"{ACTOR}megatron.tensor_model_parallel_size": 2, f"{ACTOR}megatron.pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        (TOKENS, None, (5, 8, 8, 10, 40, 512, 4)),
        (TOKENS, 1, (5, 1, 8, 80, 320, 512, 4)),
        ({}, None, (5, 8, 10, 8, 32, 512, 4)),
        (DAPO, None, (16, 16, 1, 32, 512, 512, 16)),
        (MEGATRON, None, (5, 2, 10, 32, 128, 512, 4)),
        (OF_ALL_RANKS, None, (5, 8, 10, 8, 32, 512, 4)),
    ],
)
def test_batches_of_public_scripts(values: dict[str, Any], world_size: int | None, expected: tuple[int, ...]) -> None:
    outcome = imported(values, world_size=world_size)
    grpo = outcome.config["grpo"]
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    found = (grpo["num_generations"], outcome.world_size, *(grpo[key] for key in keys))
    assert (*found, outcome.numbers["P"], outcome.steps_per_rollout) == expected


KL = {f"{ACTOR}use_kl_loss": True, f"{ACTOR}kl_loss_coef": 0.01}
OLD = {f"{ACTOR}checkpoint.contents": ["model"]}  # a key that only 0.4 has


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({f"{ACTOR}kl_loss_coef": 0.5}, "grpo.beta", None),
        (KL, "grpo.beta", 0.01),
        (KL, "grpo.use_bias_correction_kl", False),
        ({f"{ACTOR}clip_ratio": 0.4}, "grpo.epsilon", None),
        ({f"{ACTOR}clip_ratio": 0.4, f"{ACTOR}clip_ratio_low": None}, "grpo.epsilon", 0.4),
        ({f"{ACTOR}clip_ratio_high": 0.28}, "grpo.epsilon_high", 0.28),
        ({}, "grpo.delta", 3.0),
        ({f"{ACTOR}policy_loss.loss_mode": "gspo"}, "grpo.delta", None),
        ({f"{ACTOR}policy_loss.loss_mode": "gspo"}, "grpo.importance_sampling_level", "sequence"),
        ({f"{ACTOR}policy_loss.loss_mode": "gspo"}, "grpo.loss_type", "grpo"),
        ({f"{ACTOR}policy_loss.loss_mode": "cispo", f"{ACTOR}clip_ratio_high": 4}, "grpo.epsilon_high", 5),
        ({f"{ACTOR}policy_loss.loss_mode": "sapo", f"{ACTOR}tau_neg": 1.2}, "grpo.sapo_temperature_neg", 1.2),
        ({f"{ACTOR}loss_agg_mode": "seq-mean-token-sum"}, "grpo.loss_type", "luspo"),
        ({f"{ACTOR}loss_agg_mode": "seq-mean-token-sum-norm"}, "grpo.loss_type", "dr_grpo"),
        ({f"{ROLLOUT}top_k": -1}, "grpo.top_k", 0),
        ({f"{ROLLOUT}top_k": 50}, "grpo.top_k", 50),
        ({f"{ROLLOUT}repetition_penalty": 1.1}, "grpo.repetition_penalty", None),
        ({f"{ROLLOUT}repetition_penalty": 1.1, f"{ACTOR}optim.warmup_style": "constant"}, "grpo.repetition_penalty",
         1.1),
        ({}, "grpo.lr_scheduler_type", "constant"),
        ({"model_engine": "veomni"}, "grpo.lr_scheduler_type", "cosine"),
        ({"model_engine": "torchtitan"}, "grpo.lr_scheduler_type", None),  # TRL's default: linear, to 0
        ({"model_engine": "automodel"}, "grpo.lr_scheduler_kwargs.min_lr_rate", 0.01),
        ({f"{ACTOR}optim.lr_decay_style": "cosine", f"{ACTOR}optim.min_lr": 1e-7}, "grpo.lr_scheduler_kwargs.min_lr",
         1e-7),
        ({f"{ACTOR}optim.clip_grad": 0.5}, "grpo.max_grad_norm", 0.5),
        ({f"{ACTOR}grad_clip": 0.5}, "grpo.max_grad_norm", None),
        ({f"{ACTOR}grad_clip": 0.5, **OLD}, "grpo.max_grad_norm", 0.5),
        ({f"{ACTOR}grad_clip": 0.5, **OLD, **MEGATRON}, "grpo.max_grad_norm", None),
        ({f"{ACTOR}optim.lr_decay_style": "linear"}, "grpo.lr_scheduler_type", "linear"),
        ({f"{ACTOR}optim.lr_warmup_steps": 10}, "grpo.warmup_steps", 40),
        ({f"{ACTOR}optim.lr_warmup_steps_ratio": 0.1}, "grpo.warmup_steps", 0.1),
        ({f"{ACTOR}optim.lr_warmup_steps_ratio": 0.1}, "grpo.lr_scheduler_type", "constant_with_warmup"),
        ({f"{ACTOR}optim.warmup_style": "cosine", f"{ACTOR}optim.min_lr_ratio": 0.1}, "grpo.lr_scheduler_type",
         "cosine_with_min_lr"),
        ({}, "grpo.weight_decay", 0.01),
        ({}, "grpo.num_train_epochs", 30),
        ({"trainer.total_training_steps": 100}, "grpo.max_steps", 400),
        ({}, "grpo.save_strategy", "no"),
        ({"trainer.save_freq": 20}, "grpo.save_steps", 80),
        ({"trainer.test_freq": 5}, "grpo.eval_steps", 20),
        ({"trainer.test_freq": 5}, "grpo.eval_on_start", True),
        ({"trainer.test_freq": 5}, "eval_sampling.temperature", 0),
        ({"trainer.test_freq": 5, f"{ROLLOUT}val_kwargs.temperature": 0.7}, "eval_sampling.temperature", 0.7),
        ({"trainer.test_freq": 5, f"{ROLLOUT}val_kwargs.temperature": 0.7, f"{ACTOR}optim.warmup_style": "constant"},
         "eval_sampling.temperature", 0),
        ({"trainer.test_freq": 5, f"{ROLLOUT}val_kwargs.n": 16}, "grpo.per_device_eval_batch_size", 16),
        ({}, "grpo.vllm_importance_sampling_correction", False),
        ({"algorithm.rollout_correction.rollout_is": "token"}, "grpo.vllm_importance_sampling_mode", "token_truncate"),
        ({f"{CORRECTION}rollout_is": "token", f"{CORRECTION}rollout_is_threshold": "0.5_4"},
         "grpo.vllm_importance_sampling_clip_min", 0.5),
        ({}, "vllm.tensor_parallel_size", 2),
        ({}, "vllm.sleep_level", 2),
        ({f"{ROLLOUT}name": "hf"}, "grpo.use_vllm", False),
        ({f"{ROLLOUT}name": "hf", f"{ROLLOUT}gpu_memory_utilization": 0.4}, "vllm", None),
        ({f"{MODEL}lora_rank": 64}, "vllm.sleep_level", 1),
        ({f"{ROLLOUT}free_cache_engine": False}, "vllm.enable_sleep_mode", None),
        ({}, "model.dtype", "float32"),
        ({f"{ACTOR}fsdp_config.dtype": "float16"}, "grpo.fp16", True),
        ({f"{ACTOR}megatron.dtype": "float16"}, "grpo.fp16", True),
        ({f"{MODEL}lora_rank": 64}, "model.dtype", "bfloat16"),
        ({f"{MODEL}lora_rank": 64}, "peft.target_modules", "all-linear"),
        ({f"{MODEL}lora_adapter_path": "before", f"{MODEL}lora_rank": 8}, "peft", None),
        ({f"{MODEL}lora_adapter_path": "before", f"{MODEL}lora_rank": 8}, "model.adapter_reference", "base"),
        ({"data.truncation": "left"}, "data.prompt_overflow", "left"),
        ({"data.truncation": "right"}, "data.prompt_overflow", "error"),
        ({"data.train_files": "hdfs://me@host/a.parquet"}, "data.path", "hdfs://me@host/a.parquet"),
        ({"data.train_max_samples": 100}, "data.subsample", 100),
        ({"data.train_max_samples": 100, "data.shuffle": False}, "data.max_samples", 100),
        ({f"{FILTER}enable": True, f"{FILTER}max_num_gen_batches": 7}, "resample.max_rounds", 10),
        ({f"{FILTER}enable": True, f"{FILTER}max_num_gen_batches": 7, **OLD}, "resample.max_rounds", 7),
        ({f"{FILTER}enable": True, f"{FILTER}max_num_gen_batches": 7, "data.gen_batch_size": 1024, **OLD},
         "resample.max_rounds", 14),
        ({"algorithm.norm_adv_by_std_in_grpo": False}, "grpo.scale_rewards", "none"),
        ({"trainer.experiment_name": "a/b c"}, "output.name", "a-b-c"),
        ({"trainer.logger": ["console", "wandb"]}, "grpo.report_to", ["wandb"]),
        ({f"{ROLLOUT}engine_kwargs.vllm.disable_mm_preprocessor_cache": True}, "vllm.mm_processor_cache_gb", 0),
        ({"data.apply_chat_template_kwargs.thinking": False}, "grpo.chat_template_kwargs.thinking", False),
    ],
)  # fmt: skip
def test_a_setting_as_trl_has_it(values: dict[str, Any], path: str, expected: Any) -> None:
    assert value_at(imported(values).config, path) == expected


def test_tensor_parallel_groups_fit_into_the_processes() -> None:
    assert value_at(imported({}, world_size=1).config, "vllm.tensor_parallel_size") == 1


@pytest.mark.parametrize(
    ("version", "values", "loss", "verdict"),
    [
        ("2026.8", {"data.train_batch_size": 128}, "dapo", None),  # as TRL's default: no row
        ("2026.8", {}, "dapo", "changes"),
        ("2026.1", {}, "bnpo", "same"),
        ("2026.1", {"trainer.use_legacy_worker_impl": "disable", "data.train_batch_size": 128}, "dapo", None),
        ("2026.1", TOKENS, "dapo", "changes"),
        ("2025", {f"{ACTOR}ppo_micro_batch_size_per_gpu": 7}, "bnpo", "changes"),
        ("2025", {f"{ACTOR}loss_agg_mode": "seq-mean-token-mean"}, "grpo", "same"),
        ("2025", {f"{ACTOR}loss_agg_mode": "seq-mean-token-sum-norm"}, "dr_grpo", "changes"),
    ],
)
def test_the_average_of_the_loss(version: str, values: dict[str, Any], loss: str, verdict: str | None) -> None:
    outcome = imported(values, version)
    assert outcome.config["grpo"].get("loss_type", "dapo") == loss
    assert [row.kind for row in outcome.rows if row.key == f"{ACTOR}loss_agg_mode"] == [verdict] * (verdict is not None)


def test_the_oldest_average() -> None:
    outcome = imported({f"{ACTOR}use_token_level_loss": False})
    assert (outcome.version, outcome.config["grpo"]["loss_type"]) == ("2025.3", "grpo")
    assert "delta" not in outcome.config["grpo"]


@pytest.mark.parametrize(
    ("values", "given", "version"),
    [
        ({}, None, "2026.8"),
        ({"trainer.use_legacy_worker_impl": "auto"}, None, "2026.1"),
        ({f"{ACTOR}optim.warmup_style": "constant"}, None, "2025"),
        ({f"{ACTOR}use_token_level_loss": True}, None, "2025.3"),
        ({"trainer.use_v1": True, f"{ACTOR}ppo_micro_batch_size": None}, None, "2026.8"),
        ({}, "0.4.1", "2025"), ({}, "v0.7.0", "2026.1"), ({}, "0.9", "2026.8"), ({}, "2026.1", "2026.1"),
    ],
)  # fmt: skip
def test_the_version(values: dict[str, Any], given: str | None, version: str) -> None:
    outcome = imported(values, given)
    assert outcome.version == version
    assert ("assumed" in outcome.version_from) == (not values and given is None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm.adv_estimator": "gae"}, "line 1: algorithm.adv_estimator: advantages by gae"),
        ({f"{ROLLOUT}n": 1}, "one completion a prompt"),
        ({f"{ROLLOUT}multi_turn.enable": True}, "several turns"),
        ({f"{ROLLOUT}multi_turn.tool_config_path": "tools.yaml"}, "several turns"),
        ({"reward_model.enable": True}, "a reward model that verl serves"),
        ({"distillation.enabled": True}, "distillation"),
        ({f"{ACTOR}policy_loss.loss_mode": "geo_mean"}, "no loss like geo_mean"),
        ({f"{ACTOR}loss_agg_mode": True}, "no average of a loss like True"),
        ({"data.train_batch_size": 64}, "128 prompts per optimizer step, of a rollout of 64"),
        ({f"{ACTOR}ppo_micro_batch_size_per_gpu": None}, "no size of a micro batch"),
        ({"trainer.nnodes": "$(nodes)"}, "a number is needed"),
        ({f"{ACTOR}ulysses_sequence_parallel_size": 3}, "8 GPUs cannot be divided into groups of 3"),
        ({"data.train_files": []}, "no training data"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("$", r"\$")) as error:
        translated(source("verl", BASE | values))
    assert error.value.exit_code == 2


def test_the_default_estimator_and_other_programs_are_refused() -> None:
    with pytest.raises(ConfigError, match="advantages by gae, verl's default"):
        translated(source("verl", {f"{ROLLOUT}n": 5}))
    with pytest.raises(ConfigError, match=r"recipe\.prime\.main_prime does not train by GRPO"):
        translated(source("verl", BASE, program="recipe.prime.main_prime"))
    with pytest.raises(ConfigError, match=r"'1\.2' is no version of verl"):
        translated(source("verl", BASE), "1.2")


def test_several_files_are_a_mixture_with_its_own_held_out_rows() -> None:
    values = {"data.train_files": "['a/train.parquet', 'b/train.parquet']", "trainer.test_freq": 5}
    data = imported(values | {"data.val_files": ["a/test.parquet", "b/test.parquet"]}).config["data"]
    columns = {"ground_truth": "reward_model.ground_truth"}
    assert data["mix"]["train"]["columns"] is not data["mix"]["b_train"]["columns"]
    assert data["mix"] == {
        "train": {"path": "a/train.parquet", "columns": columns, "eval_path": "a/test.parquet"},
        "b_train": {"path": "b/train.parquet", "columns": columns, "eval_path": "b/test.parquet"},
    }
    one = imported({"trainer.test_freq": 5, "data.val_files": ["a/test.parquet", "b/test.parquet"]}).config["data"]
    assert one["eval"] == {"test": {"path": "a/test.parquet"}, "b_test": {"path": "b/test.parquet"}}


FLOORS = {
    f"{ACTOR}optim.min_lr_ratio": 0.1, f"{ACTOR}optim.min_lr": 0.0, f"{ACTOR}optim.lr_scheduler_type": "cosine"
}  # fmt: skip
LINEAR = {f"{ACTOR}optim.min_lr": 1e-7, f"{ACTOR}optim.lr_decay_style": "linear"}


def test_a_floor_of_the_rate_beside_one_that_is_zero() -> None:
    assert value_at(imported(FLOORS).config, "grpo.lr_scheduler_kwargs") == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    ("values", "version", "key", "kind"),
    [
        ({}, "2025.3", "algorithm.kl_ctrl.kl_coef", "none"),
        ({"algorithm.use_kl_in_reward": True}, None, "algorithm.use_kl_in_reward", "none"),
        (KL | {f"{ACTOR}policy_loss.loss_mode": "gspo"}, None, f"{ACTOR}loss_agg_mode", "changes"),
        ({f"{ROLLOUT}ignore_eos": False}, None, f"{ROLLOUT}ignore_eos", "same"),
        ({"actor_rollout_ref.hybrid_engine": False}, None, "actor_rollout_ref.hybrid_engine", "none"),
        ({"trainer.total_training_steps": 100, "trainer.total_epochs": 1}, None, "trainer.total_epochs", "changes"),
        ({f"{FILTER}enable": True}, "2025", f"{FILTER}enable", "same"),
        ({f"{FILTER}enable": True, "data.gen_batch_size": 1024}, "2025.3", "data.gen_batch_size", "changes"),
        ({f"{FILTER}enable": True, "data.gen_batch_size": 1024}, "2026.8", "data.gen_batch_size", "speed"),
        ({f"{ACTOR}optim.min_lr": 1e-7}, None, f"{ACTOR}optim.min_lr", "same"),
        (LINEAR, None, f"{ACTOR}optim.min_lr", "changes"),
        (FLOORS, None, f"{ACTOR}optim.min_lr", "same"),
        ({f"{CORRECTION}rollout_rs_threshold_lower": 0.9}, None, f"{CORRECTION}rollout_rs_threshold_lower", "none"),
        ({f"{MODEL}lora.rank": 8, f"{MODEL}lora.type": "dora"}, None, f"{MODEL}lora.type", "none"),
        ({f"{MODEL}lora.type": "dora"}, None, f"{MODEL}lora.type", "same"),
        ({f"{ACTOR}torchtitan.tensor_parallel_size": 2}, None, f"{ACTOR}torchtitan.tensor_parallel_size", "speed"),
    ],
)
def test_verdicts(values: dict[str, Any], version: str | None, key: str, kind: str) -> None:
    read = source("verl", BASE | values, program="verl.trainer.main_ppo")
    assert row(translated(read, version).finished(), key).kind == kind


def test_defaults_and_rollouts_of_older_versions() -> None:
    assert value_at(imported({}, "2025.3").config, "grpo.entropy_coef") == 0.001
    fetched = {"data.gen_batch_size": 1024}
    assert [imported(fetched, version).numbers["P"] for version in ("2026.1", "2026.8")] == [1024, 512]
    variables = {"VLLM_ATTENTION_BACKEND": Setting("XFORMERS", 1)}
    newer = {f"{ROLLOUT}checkpoint_engine.backend": "nccl"}
    read = [source("verl", BASE | more, environment=variables) for more in ({}, newer)]
    assert [translated(one).finished().version for one in read] == ["2025", "2026.8"]


def test_a_reward_of_ones_own_and_the_penalty_of_length() -> None:
    buffer = "reward_model.reward_kwargs.overlong_buffer_cfg."
    outcome = imported(
        {
            "custom_reward_function.path": "own.py", "custom_reward_function.name": "score",
            "custom_reward_function.reward_kwargs.scale.right": 2, "reward_model.reward_manager": "dapo",
            f"{buffer}enable": True, f"{buffer}len": 128, f"{buffer}penalty_factor": 0.5,
            "reward_model.reward_kwargs.max_resp_len": 400,
        }
    )  # fmt: skip
    own, penalty = outcome.config["rewards"]
    assert own == {"name": "verl_score:score"} and "{'scale': {'right': 2}}" in outcome.files["verl_score.py"]
    assert penalty["weight"] == 0.5 and penalty["params"] == {"max_completion_len": 400, "soft_punish_cache": 128}


@pytest.mark.parametrize("key", [f"{ACTOR}unheard_of", "trainer.unheard_of"])
def test_a_key_that_nobody_knows_is_said(key: str) -> None:
    assert row(imported({key: 3}), key).why.startswith("not a key that is known")


SCRIPT = """\
set -x
N=${N:-4}
ARGS=(
    algorithm.adv_estimator=grpo
    data.train_batch_size=64
    data.train_files=$HOME/data/train.parquet
    actor_rollout_ref.actor.ppo_mini_batch_size=32
)
python3 -m verl.trainer.main_ppo "${ARGS[@]}" \\
    actor_rollout_ref.rollout.n=$N \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=$((N * 2)) \\
    actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct \\
    trainer.n_gpus_per_node=2 trainer.logger='["console","wandb"]' "$@"
"""


def test_a_script_from_its_text_to_a_configuration(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(SCRIPT)
    outcome = import_file(script, environment={"N": "8"}).finished()
    assert (outcome.source, outcome.numbers["G"], outcome.numbers["m"]) == ("verl", 8, 16)
    assert row(outcome, "data.train_batch_size").line == 5
    assert outcome.config["data"]["path"] == "~/data/train.parquet"
    script.write_text(SCRIPT.replace("main_ppo", "main_ppo --config-path=config --config-name=ppo_megatron_trainer"))
    assert import_file(script).finished().warnings == []
    script.write_text(SCRIPT.replace("main_ppo", "main_ppo --config-path=/mine --config-name=ppo_trainer"))
    assert "mine/ppo_trainer.yaml is not beside this file" in import_file(script).finished().warnings[0]
    script.write_text(SCRIPT.replace("$HOME", "$(dirname $0)"))
    assert "correct data.path" in import_file(script).finished().warnings[0]


def test_a_copy_of_the_trainers_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [ppo_trainer, _self_]\ndata: {train_files: a.parquet, max_prompt_length: 100}\n"
        "actor_rollout_ref:\n  actor: {ppo_micro_batch_size_per_gpu: 4, optim: {lr: 1e-5}}\n"
        "  rollout: {n: 8, prompt_length: '${data.max_prompt_length}'}\nalgorithm: {adv_estimator: grpo}\n"
    )
    outcome = import_file(file).finished()
    assert outcome.config["grpo"]["learning_rate"] == 1e-5 and outcome.numbers["P"] == 1024
    assert row(outcome, f"{ROLLOUT}prompt_length").value == 100


@pytest.mark.parametrize("said", [f"{ACTOR}strategy=megatron", "--config-name=ppo_megatron_trainer"])
def test_megatron_clips_by_its_own_key(tmp_path: Path, said: str) -> None:
    """By the strategy of the actor, which verl's own configuration for Megatron sets too."""
    values = {**BASE, f"{ACTOR}optim.clip_grad": 0.5}
    words = " ".join([said, *(f"{key}={value}" for key, value in values.items())])
    (tmp_path / "run.sh").write_text(f"python3 -m verl.trainer.main_ppo {words}\n")
    outcome = import_file(tmp_path / "run.sh", version="2026.1").finished()
    assert value_at(outcome.config, "grpo.max_grad_norm") == 0.5
