"""verl's defaults that matter, by version, and what becomes of keys that need no arithmetic.

Read in verl/trainer/config at 1dda039 (08/2026), b178a3c (01/2026), 4e9586a (05/2025) and 03150d4 (03/2025).
"""

from collections.abc import Mapping
from typing import Any

from grpo_autotune.records.imported import Verdict

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}." for name in ("actor", "model", "rollout"))
REF, OPTIM, FSDP = "actor_rollout_ref.ref.", f"{ACTOR}optim.", f"{ACTOR}fsdp_config."
CORRECTION, FILTER = "algorithm.rollout_correction.", "algorithm.filter_groups."
LEGACY = "trainer.use_legacy_worker_impl"
"""Workers that average a loss over a micro batch, not over the optimizer step's completions."""

NEWEST: dict[str, Any] = {
    "data.train_files": "~/data/rlhf/gsm8k/train.parquet", "data.val_files": "~/data/rlhf/gsm8k/test.parquet",
    "data.train_batch_size": 1024, "data.max_prompt_length": 512, "data.max_response_length": 512,
    "data.filter_overlong_prompts": False, "data.truncation": "error", "data.shuffle": True,
    "data.prompt_key": "prompt", "data.image_key": "images", "data.train_max_samples": -1, "data.val_max_samples": -1,
    "algorithm.adv_estimator": "gae", "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.use_kl_in_reward": False,
    f"{CORRECTION}rollout_is": None, f"{CORRECTION}rollout_is_threshold": 2.0,
    f"{MODEL}path": "~/models/deepseek-llm-7b-chat", f"{MODEL}enable_gradient_checkpointing": True,
    f"{MODEL}lora_rank": 0, f"{MODEL}lora_alpha": 16, f"{MODEL}target_modules": "all-linear",
    f"{ACTOR}ppo_mini_batch_size": 256, f"{ACTOR}ppo_max_token_len_per_gpu": 16384, f"{ACTOR}use_dynamic_bsz": False,
    f"{ACTOR}ppo_epochs": 1, f"{ACTOR}clip_ratio": 0.2, f"{ACTOR}clip_ratio_low": 0.2, f"{ACTOR}clip_ratio_high": 0.2,
    f"{ACTOR}clip_ratio_c": 3.0, f"{ACTOR}loss_agg_mode": "token-mean", f"{ACTOR}policy_loss.loss_mode": "vanilla",
    f"{ACTOR}tau_pos": 1.0, f"{ACTOR}tau_neg": 1.05, f"{ACTOR}entropy_coeff": 0, f"{ACTOR}use_kl_loss": False,
    f"{ACTOR}kl_loss_coef": 0.001, f"{ACTOR}kl_loss_type": "low_var_kl", f"{ACTOR}grad_clip": 1.0,
    f"{ACTOR}freeze_vision_tower": False, f"{ACTOR}strategy": "fsdp", f"{FSDP}model_dtype": "fp32",
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

CHANGED: Mapping[str, Mapping[str, Any]] = {
    "2026.8": {},
    "2026.1": {LEGACY: "auto"},
    "2025": {LEGACY: "auto", f"{ROLLOUT}enforce_eager": True, f"{ROLLOUT}max_num_seqs": 1024},
    "2025.3": {
        LEGACY: "auto", f"{ROLLOUT}enforce_eager": True, f"{ROLLOUT}max_num_seqs": 1024, f"{ACTOR}clip_ratio_c": None
    },
}  # fmt: skip
"""Version -> defaults that differ from the newest. 2025.3 is up to release 0.3, 2025 is 0.4, 2026.1 is 0.5 to 0.7."""

MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("2025.3", (f"{ACTOR}use_token_level_loss",)),
    ("2026.8", ("trainer.use_v1", "trainer.v1.", "reward.", "distillation.", "transfer_queue.", "model_engine", "data.audio_key",
                "data.mm_processor_kwargs", "skip.", "ray_kwargs.ray_init.runtime_env.")),
    ("2026.1", (LEGACY, "reward_manager.", "data.sampler.", "data.datagen.", f"{ROLLOUT}skip_rollout")),
    ("2025", (f"{OPTIM}warmup_style", "ray_init.", f"{ACTOR}checkpoint.contents", f"{ROLLOUT}chat_scheduler",
              f"{ROLLOUT}use_fire_sampling", "reward_model.overlong_buffer.", f"{ACTOR}ppo_micro_batch_size",
              f"{REF}log_prob_micro_batch_size", f"{ROLLOUT}engine_kwargs.swap_space")),
    ("2026.1", ("reward_model.", "custom_reward_function.")),
)  # fmt: skip
"""Keys, or beginnings of keys, that only such a version has; the first that a file has decides."""

SAME: Mapping[str, str] = {
    f"{MODEL}path": "model.name_or_path", f"{MODEL}trust_remote_code": "model.trust_remote_code",
    f"{MODEL}override_config.attn_implementation": "model.attn_implementation",
    f"{MODEL}custom_chat_template": "data.chat_template",
    f"{MODEL}enable_gradient_checkpointing": "grpo.gradient_checkpointing",
    f"{ACTOR}freeze_vision_tower": "model.freeze_vision_tower", f"{ACTOR}entropy_coeff": "grpo.entropy_coef",
    f"{ACTOR}grad_clip": "grpo.max_grad_norm", f"{OPTIM}clip_grad": "grpo.max_grad_norm", f"{OPTIM}lr": "grpo.learning_rate",
    f"{OPTIM}weight_decay": "grpo.weight_decay", f"{ROLLOUT}temperature": "grpo.temperature",
    f"{ROLLOUT}top_p": "grpo.top_p", f"{ROLLOUT}repetition_penalty": "grpo.repetition_penalty",
    f"{ROLLOUT}quantization": "vllm.quantization", f"{ROLLOUT}limit_images": "vllm.limit_mm_per_prompt.image",
    "data.shuffle": "grpo.shuffle_dataset", "data.seed": "grpo.seed",
}  # fmt: skip

FAST: Mapping[str, str] = {
    f"{ROLLOUT}{name}": f"vllm.{name}"
    for name in (
        "max_num_batched_tokens",
        "max_num_seqs",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "enforce_eager",
    )
}
"""Settings of the engine that change seconds alone."""

NO_PADDING = "TRL pads a micro batch to its longest completion; `speedups: auto` forwards a prompt once per group"
SHARDING = "FSDP's placement of weights; see `grpo.fsdp` and `grpo.deepspeed` for several GPUs"
NO_GRADIENT = "TRL's passes without gradient use per_device_train_batch_size"
WORDS: Mapping[str, tuple[Verdict, str]] = {
    **{f"{MODEL}{name}": ("speed only", NO_PADDING) for name in ("use_remove_padding", "use_prefix_grouper")},
    **{f"{MODEL}{name}": ("speed only", "another kernel for the same numbers") for name in (
        "use_fused_kernels", "fused_kernel_options.", "use_liger", "tiled_mlp.", "enable_activation_offload", "use_shm")},
    f"{ACTOR}use_prefix_grouper": ("speed only", NO_PADDING), f"{ACTOR}use_remove_padding": ("speed only", NO_PADDING),
    f"{ACTOR}use_torch_compile": ("speed only", "see `grpo.torch_compile`"),
    f"{ACTOR}use_fused_kernels": ("speed only", "another kernel for the same numbers"),
    f"{ACTOR}entropy_": ("speed only", "memory of the entropy"), f"{ACTOR}strategy": ("speed only", SHARDING), FSDP: ("speed only", SHARDING),
    f"{ACTOR}calculate_entropy": ("speed only", "the entropy is always logged"), f"{ACTOR}megatron.": ("speed only", "Megatron's placement of weights"),
    f"{ACTOR}veomni.": ("speed only", "VeOmni's placement of weights"), f"{ACTOR}fsdp_size": ("speed only", SHARDING),
    f"{ACTOR}shuffle": ("same", "TRL shuffles a rollout's completions before its optimizer steps"),
    f"{ACTOR}data_loader_seed": ("same", "another order of the same completions"), f"{ACTOR}checkpoint.": ("speed only", "what a checkpoint holds; TRL's hold all"),
    f"{ACTOR}load_weight": ("speed only", "loading"), f"{ACTOR}profiler.": ("speed only", "grpo-autotune probe measures"),
    f"{ACTOR}router_replay.": ("no equivalent", "experts of the rollout are not replayed in training"),
    f"{ACTOR}optim.": ("no equivalent", "TRL's AdamW has no such setting"),
    f"{OPTIM}override_optimizer_config.": ("speed only", "where and in which type the optimizer's state lies"),
    f"{OPTIM}total_training_steps": ("same", "the source sets it when it starts"), f"{OPTIM}num_cycles": ("same", "half a cosine"),
    f"{OPTIM}zero_indexed_step": ("same", "the schedule's first step"),
    REF: ("speed only", NO_GRADIENT), f"{ROLLOUT}log_prob_": ("speed only", NO_GRADIENT),
    f"{ROLLOUT}mode": ("speed only", "how the engine is called"), f"{ROLLOUT}dtype": ("speed only", "the engine computes in the trainer's type"),
    f"{ROLLOUT}load_format": ("same", "the engine's weights come from the trainer before the first rollout"), f"{ROLLOUT}layered_summon": ("speed only", "how weights are collected"),
    f"{ROLLOUT}calculate_log_probs": ("same", "for the report and the correction of rollouts, which has its own row"),
    f"{ROLLOUT}do_sample": ("same", "sampling"), f"{ROLLOUT}ignore_eos": ("no equivalent", "completions end at the end token"),
    f"{ROLLOUT}agent.": ("speed only", "workers that ask the engine"), f"{ROLLOUT}multi_turn.": ("same", "one turn"),
    f"{ROLLOUT}engine_kwargs.": ("no equivalent", "an option of an engine that is not used here"),
    f"{ROLLOUT}prompt_length": ("same", "that of the data"), f"{ROLLOUT}response_length": ("same", "that of the data"),
    **{f"{ROLLOUT}{name}": ("speed only", "the engine runs inside the training processes") for name in (
        "data_parallel_size", "expert_parallel_size", "pipeline_model_parallel_size", "checkpoint_engine.", "nnodes", "multi_stage_wake_up",
        "n_gpus_per_node", "disable_log_stats", "skip_tokenizer_init", "trace.", "prometheus.", "profiler.", "seed", "scheduling_policy", "over_sample_rate")},
    f"{ROLLOUT}enable_rollout_routing_replay": ("no equivalent", "experts of the rollout are not replayed in training"),
    f"{ROLLOUT}val_kwargs.": ("same", "nothing is evaluated"), f"{ROLLOUT}top_": ("same", ""),
    f"{MODEL}override_config.": ("no equivalent", "the checkpoint's own configuration holds"), f"{MODEL}mtp.": ("no equivalent", "no prediction of several tokens"),
    f"{MODEL}lora_adapter_path": ("no equivalent", "model.adapter names a folder that PEFT saved; set it by hand and leave out `peft`"),
    f"{MODEL}lora.": ("no equivalent", "Megatron's LoRA; write `peft` by hand"), f"{MODEL}external_lib": ("no equivalent", "a module that is imported first"),
    f"{MODEL}tokenizer_path": ("no equivalent", "the tokenizer of the model is taken"), f"{MODEL}hf_config_path": ("no equivalent", "the model's own is taken"),
    "actor_rollout_ref.hybrid_engine": ("same", "trainer and engine share the GPUs"), "actor_rollout_ref.nccl_timeout": ("speed only", "see `grpo.ddp_timeout`"),
    **{name: ("same", "PPO's, without effect with grpo") for name in ("critic.", "trainer.critic_warmup", "algorithm.gamma", "algorithm.lam")},
    "algorithm.kl_ctrl.": ("same", "KL in the reward, which is off"), "algorithm.kl_penalty": ("same", "KL in the reward, which is off"),
    "algorithm.use_kl_in_reward": ("no equivalent", "KL in the reward: TRL has it in the loss alone (grpo.beta)"),
    "algorithm.": ("no equivalent", "not in TRL"), CORRECTION: ("no equivalent", "TRL's correction has no such setting"),
    f"{CORRECTION}loss_type": ("same", "of the bypass mode"), FILTER: ("same", "of the filter, which has its own row"),
    "data.return_": ("same", "columns that a source's own code asks for"), "data.trust_remote_code": ("same", "of the data's loader"),
    "data.reward_fn_key": ("same", "the column that chooses a built-in reward, in the reward's row"),
    **{name: ("speed only", "workers and caches") for name in ("data.filter_overlong_prompts_workers", "data.dataloader_num_workers", "data.use_shm", "data.val_batch_size", "data.gen_batch_size")},
    "data.video_key": ("no equivalent", "no videos"), "data.audio_key": ("no equivalent", "no sound"), "data.custom_cls.": ("no equivalent", "a data set in code: write its rows to a file"),
    "data.sampler.": ("no equivalent", "an order of its own"), "data.tokenizer": ("no equivalent", "the model's own is taken"), "data.image_patch_size": ("same", "the model's processor knows it"),
    "data.tool_config_path": ("no equivalent", "no tools"),
    "trainer.": ("speed only", "no part of what is learned"), "trainer.default_local_dir": ("speed only", "the run folder is output.dir"),
    "trainer.balance_batch": ("speed only", "which process gets which completion"), "trainer.resume_mode": ("speed only", "grpo-autotune train --resume"),
    "trainer.project_name": ("speed only", "the tracker's own variable, such as WANDB_PROJECT"),
    "ray_kwargs.": ("speed only", "no Ray here"), "ray_init.": ("speed only", "no Ray here"), "global_profiler.": ("speed only", "grpo-autotune probe measures"),
    "transfer_queue.": ("speed only", "no Ray here"), "hydra.": ("speed only", "Hydra's own"), "defaults": ("speed only", "Hydra's own"), "model_engine": ("speed only", SHARDING),
    "reward.": ("no equivalent", "the adapter calls the function alone"), "reward_model.": ("no equivalent", "the adapter calls the function alone"),
    "custom_reward_function.": ("no equivalent", "the adapter calls the function alone"),
    "reward.num_workers": ("speed only", "workers"), "reward_model.launch_reward_fn_async": ("speed only", "when the reward is computed"), "reward_model.num_workers": ("speed only", "workers"),
    "reward_model.use_reward_loop": ("speed only", "where the reward is computed"),
}  # fmt: skip
"""Key, or beginning of keys, -> verdict and note, where nothing else was said."""
