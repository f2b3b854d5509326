"""verl's defaults that matter, by version, and what becomes of keys that need no arithmetic.

Read in verl/trainer/config at 1dda039 (08/2026), b178a3c (01/2026), 4e9586a (05/2025) and 03150d4 (03/2025).
"""

from collections.abc import Mapping
from typing import Any

from grpo_autotune.interop.frameworks.rollout_trainers import words

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}." for name in ("actor", "model", "rollout"))
REF, OPTIM, FSDP = "actor_rollout_ref.ref.", f"{ACTOR}optim.", f"{ACTOR}fsdp_config."
CORRECTION, FILTER = "algorithm.rollout_correction.", "algorithm.filter_groups."
LEGACY = "trainer.use_legacy_worker_impl"
"""Workers that average a loss over a micro batch, not over the optimizer step's completions."""

NEWEST: dict[str, Any] = {
    "data.train_files": "~/data/rlhf/gsm8k/train.parquet", "data.val_files": "~/data/rlhf/gsm8k/test.parquet",
    "data.train_batch_size": 1024, "data.max_prompt_length": 512, "data.max_response_length": 512,
    "data.filter_overlong_prompts": False, "data.truncation": "error", "data.shuffle": True,
    "data.prompt_key": "prompt", "data.image_key": "images", "data.reward_fn_key": "data_source",
    "algorithm.adv_estimator": "gae", "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.use_kl_in_reward": False,
    f"{CORRECTION}rollout_is": None, f"{CORRECTION}rollout_is_threshold": 2.0,
    f"{MODEL}path": "~/models/deepseek-llm-7b-chat", f"{MODEL}enable_gradient_checkpointing": True,
    f"{MODEL}lora_rank": 0, f"{MODEL}lora_alpha": 16, f"{MODEL}target_modules": "all-linear",
    f"{ACTOR}ppo_mini_batch_size": 256, f"{ACTOR}ppo_max_token_len_per_gpu": 16384, f"{ACTOR}use_dynamic_bsz": False,
    f"{ACTOR}ppo_epochs": 1, f"{ACTOR}clip_ratio": 0.2, f"{ACTOR}clip_ratio_low": 0.2, f"{ACTOR}clip_ratio_high": 0.2,
    f"{ACTOR}clip_ratio_c": 3.0, f"{ACTOR}loss_agg_mode": "token-mean", f"{ACTOR}policy_loss.loss_mode": "vanilla",
    f"{ACTOR}tau_pos": 1.0, f"{ACTOR}tau_neg": 1.05, f"{ACTOR}entropy_coeff": 0, f"{ACTOR}use_kl_loss": False,
    f"{ACTOR}kl_loss_coef": 0.001, f"{ACTOR}kl_loss_type": "low_var_kl", f"{ACTOR}grad_clip": 1.0,
    f"{FSDP}model_dtype": "fp32",
    f"{OPTIM}lr": 1e-6, f"{OPTIM}weight_decay": 0.01, f"{OPTIM}betas": [0.9, 0.999], f"{OPTIM}lr_warmup_steps": -1,
    f"{OPTIM}lr_warmup_steps_ratio": 0.0, f"{OPTIM}lr_scheduler_type": "constant", f"{OPTIM}min_lr_ratio": 0.0,
    f"{ROLLOUT}n": 1, f"{ROLLOUT}name": "vllm", f"{ROLLOUT}temperature": 1.0, f"{ROLLOUT}top_p": 1.0,
    f"{ROLLOUT}top_k": -1, f"{ROLLOUT}gpu_memory_utilization": 0.5, f"{ROLLOUT}tensor_model_parallel_size": 2,
    f"{ROLLOUT}free_cache_engine": True, f"{ROLLOUT}val_kwargs.n": 1, f"{ROLLOUT}val_kwargs.temperature": 0,
    f"{ROLLOUT}val_kwargs.do_sample": False, f"{ROLLOUT}val_kwargs.top_p": 1.0, f"{ROLLOUT}val_kwargs.top_k": -1,
    "trainer.nnodes": 1, "trainer.n_gpus_per_node": 8, "trainer.total_epochs": 30, "trainer.save_freq": -1,
    "trainer.test_freq": -1, "trainer.val_before_train": True, "trainer.logger": ["console", "wandb"],
    "custom_reward_function.name": "compute_score", LEGACY: "disable",
}  # fmt: skip

CHANGED: Mapping[str, Mapping[str, Any]] = {  # version -> defaults that differ from the newest
    "2026.8": {},
    "2026.1": {LEGACY: "auto"},
    "2025": {LEGACY: "auto", f"{ROLLOUT}enforce_eager": True, f"{ROLLOUT}max_num_seqs": 1024},
    "2025.3": {
        LEGACY: "auto",
        f"{ACTOR}clip_ratio_c": None,
        f"{ACTOR}entropy_coeff": 0.001,
        "algorithm.kl_ctrl.kl_coef": 0.001,
    },
}
RELEASES = (((0, 4), "2025.3"), ((0, 5), "2025"), ((0, 8), "2026.1"), ((99,), "2026.8"))
"""First release that is too new for a version."""
LOOPS = ("2026.1", "2026.8")
"""Versions whose agent loop fixes the penalty of repetition, and reads of `val_kwargs` temperature, top_p and top_k."""

MARKS = (  # keys, beginnings of keys, or variables that only such a version has; the first that a file has decides
    ("2025.3", f"{ACTOR}use_token_level_loss custom_reward_function.overlong_buffer."),
    ("2026.8", "trainer.use_v1 trainer.v1. reward. distillation. transfer_queue. model_engine data.audio_key "
               "data.mm_processor_kwargs skip. ray_kwargs.ray_init.runtime_env."),
    ("2026.1", f"{LEGACY} reward_manager. data.sampler. data.datagen. {ROLLOUT}skip_rollout"),
    ("2025", f"{OPTIM}warmup_style ray_init. {ACTOR}checkpoint.contents {ROLLOUT}chat_scheduler "
             f"reward_model.overlong_buffer. {ACTOR}ppo_micro_batch_size {ROLLOUT}log_prob_micro_batch_size "
             "VLLM_ATTENTION_BACKEND=XFORMERS"),
    ("2026.1", "reward_model. custom_reward_function."),
)  # fmt: skip

SAME: Mapping[str, str] = {
    f"{MODEL}path": "model.name_or_path", f"{MODEL}trust_remote_code": "model.trust_remote_code",
    f"{MODEL}override_config.attn_implementation": "model.attn_implementation",
    f"{MODEL}custom_chat_template": "model.chat_template",
    f"{MODEL}enable_gradient_checkpointing": "grpo.gradient_checkpointing", f"{OPTIM}lr": "grpo.learning_rate",
    f"{ACTOR}freeze_vision_tower": "model.freeze_vision_tower", f"{ACTOR}entropy_coeff": "grpo.entropy_coef",
    f"{ACTOR}grad_clip": "grpo.max_grad_norm", f"{OPTIM}clip_grad": "grpo.max_grad_norm",
    f"{OPTIM}weight_decay": "grpo.weight_decay", f"{ROLLOUT}temperature": "grpo.temperature",
    f"{ROLLOUT}top_p": "grpo.top_p",
    f"{ROLLOUT}quantization": "vllm.quantization", f"{ROLLOUT}max_model_len": "vllm.max_model_len",
    f"{ROLLOUT}limit_images": "vllm.limit_mm_per_prompt.image", "data.shuffle": "grpo.shuffle_dataset",
    "data.seed": "grpo.seed",
}  # fmt: skip
FAST: Mapping[str, str] = {  # settings of the engine that change seconds alone
    f"{ROLLOUT}{name}": f"vllm.{name}" for name in (
        "max_num_batched_tokens", "max_num_seqs", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager",
        "cudagraph_capture_sizes")
}  # fmt: skip

WORDS = words(  # key, or beginning of keys, -> verdict and note, where nothing else was said
    {
        ("speed", "TRL pads a micro batch to its longest completion; `speedups: auto` forwards a prompt once"):
            "model.use_remove_padding actor.use_remove_padding actor.use_prefix_grouper actor.pad_to_length",
        ("speed", "another kernel for the same numbers"):
            "model.use_fused_kernels model.fused_kernel_options. model.use_liger model.tiled_mlp. actor.entropy_ "
            "actor.use_fused_kernels actor.use_torch_compile model.enable_activation_offload",
        ("speed", "where weights and the optimizer lie: `grpo.fsdp` and `grpo.deepspeed` for several GPUs"):
            "actor.strategy actor.fsdp_config. actor.fsdp_size actor.megatron. actor.veomni. actor.engine. "
            "actor.torchtitan. ref.torchtitan. actor.automodel. ref.automodel. "
            "actor.model_engine model_engine actor@ ref@ optim.override_optimizer_config. actor.load_weight "
            "ref.fsdp_config. ref.megatron. ref.veomni. ref.strategy ref.ulysses_sequence_parallel_size",
        ("speed", "passes without gradient use per_device_train_batch_size"): "ref. rollout.log_prob_",
        ("speed", "the engine runs inside the training processes"):
            "rollout.mode rollout.data_parallel_size rollout.expert_parallel_size rollout.pipeline_model_parallel_size "
            "rollout.moe_tensor_parallel_size rollout.checkpoint_engine. rollout.nnodes rollout.n_gpus_per_node "
            "rollout.multi_stage_wake_up rollout.disable_log_stats rollout.skip_tokenizer_init rollout.trace. "
            "rollout.seed rollout.prometheus. rollout.profiler. rollout.scheduling_policy rollout.over_sample_rate "
            "rollout.agent. rollout.dtype rollout.layered_summon rollout.engine_kwargs. rollout.swap_space "
            "rollout.chat_scheduler",
        ("speed", "grpo-autotune probe measures"): "actor.profiler. global_profiler.",
        ("speed", "no part of what is learned"):
            "trainer.balance_batch trainer.default_hdfs_dir trainer.del_local_ckpt_after_load trainer.device "
            "trainer.esi_redundant_time trainer.log_val_generations trainer.val_generations_to_log_to_wandb "
            "trainer.max_actor_ckpt_to_keep trainer.max_critic_ckpt_to_keep trainer.ray_ trainer.npu_profile. "
            "trainer.remove_previous_ckpt_in_save trainer.rollout_data_dir trainer.validation_data_dir "
            "trainer.use_legacy_worker_impl trainer.use_v1 trainer.v1. trainer.profile_ trainer.nccl_timeout "
            "model.use_shm model.lora.merge data.use_shm data.filter_overlong_prompts_workers "
            "data.val_batch_size data.validation_shuffle data.dataloader_num_workers data.gen_batch_size skip. "
            "actor.calculate_entropy actor.checkpoint. ray_kwargs. ray_init. transfer_queue. hydra. defaults "
            "actor_rollout_ref.nccl_timeout",
        ("speed", "the run folder is output.dir"): "trainer.default_local_dir",
        ("speed", "grpo-autotune train --resume"): "trainer.resume_mode",
        ("speed", "the tracker's own variable, such as WANDB_PROJECT"): "trainer.project_name",
        ("speed", "how a reward is called"):
            "reward. reward_model. custom_reward_function. reward_manager.",
        ("same", "TRL shuffles the completions of each rollout"): "actor.shuffle actor.data_loader_seed",
        ("same", "the source sets it when it starts"):
            "optim.total_training_steps rollout.prompt_length rollout.response_length",
        ("same", "the engine's weights come from the trainer before the first rollout"): "rollout.load_format",
        ("same", "goes with algorithm.filter_groups.enable"): "algorithm.filter_groups.",
        ("same", "goes with algorithm.rollout_correction.rollout_is"):
            "algorithm.rollout_correction. rollout.calculate_log_probs",
        ("same", "evaluation's sampling"): "rollout.val_kwargs.",
        ("same", "one turn, sampled"): "rollout.multi_turn. rollout.do_sample",
        ("same", "goes with the schedule"): "optim.num_cycles optim.zero_indexed_step optim.min_lr_ratio",
        ("same", "verl reads it under `actor.`"): "actor.policy_loss.tau_",
        ("same", "PPO's, without effect with grpo"): "critic. trainer.critic_warmup algorithm.gamma algorithm.lam",
        ("same", "of KL in the reward alone"): "algorithm.kl_ctrl. algorithm.kl_penalty",
        ("same", "the model's processor knows it"): "data.image_patch_size",
        ("same", "for the source's own code"): "data.return_ data.trust_remote_code",
        ("same", "rows with videos or sound are not read here"): "data.video_key data.audio_key",
        ("none", "KL in the reward: TRL has it in the loss alone (grpo.beta)"): "algorithm.use_kl_in_reward",
        ("none", "a row's experts in the rollout are not replayed in training"):
            "actor.router_replay.mode actor.megatron.router_replay.mode actor.veomni.router_replay.mode "
            "rollout.enable_rollout_routing_replay",
        ("none", "the router's loss is that of the model's own configuration"):
            "actor.megatron.override_transformer_config.moe_aux_loss_coeff "
            "actor.megatron.override_transformer_config.moe_z_loss_coeff",
        ("none", "TRL's AdamW has no such setting"): "optim. actor.qat.",
        ("none", "completions end at the end token"): "rollout.ignore_eos",
        ("none", "grpo-autotune infer evaluates alone"): "trainer.val_only",
        ("none", "grpo-autotune train --resume, of its own checkpoints"): "trainer.resume_from_path",
        ("none", "the model's own configuration holds"):
            "model.override_config. model.tokenizer_path model.hf_config_path model.external_lib "
            "data.tokenizer",
        ("none", "Megatron's LoRA is not read: set a peft section by hand"): "model.lora.",
        ("none", "TRL trains no heads that predict several tokens"): "model.mtp.",
        ("none", "data in code: write the rows to a file"): "data.custom_cls. data.sampler. data.datagen.",
        ("none", "TRL corrects by importance weights alone"):
            "algorithm.rollout_correction.rollout_rs algorithm.rollout_correction.rollout_rs_threshold "
            "algorithm.rollout_correction.bypass_mode algorithm.rollout_correction.rollout_is_batch_normalize",
    },
    {"optim": f"{ACTOR}", **dict.fromkeys(("actor", "model", "rollout", "ref"), "actor_rollout_ref.")},
)  # fmt: skip
