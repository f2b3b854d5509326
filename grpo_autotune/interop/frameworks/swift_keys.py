"""Keys of ms-swift as tables: defaults by version, older names, and what becomes of each.

Read in modelscope/ms-swift at 3602360 (4.5) and its tags from v3.2.0 on: swift/arguments/{rlhf_args,sft_args,
tuner_args}.py, swift/trainers/arguments.py, swift/rlhf_trainers/args_mixin.py, swift/megatron/arguments/megatron_args.py.
"""

from typing import Any

NEWEST = "4.5"

DEFAULTS: dict[str, Any] = {
    "num_generations": 8, "beta": 0.04, "temperature": 0.9, "top_p": 1.0, "top_k": -1, "epsilon": 0.2,
    "loss_type": "grpo", "scale_rewards": "group", "importance_sampling_level": "token", "num_iterations": 1,
    "max_completion_length": 512, "max_length": None, "truncation_strategy": "left", "advantage_estimator": "grpo",
    "rollout_importance_sampling_mode": None, "rollout_importance_sampling_threshold": 2.0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": None, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "warmup_ratio": 0.0, "num_train_epochs": 3, "logging_steps": 5, "save_strategy": "steps",
    "save_steps": 500, "eval_strategy": None, "split_dataset_ratio": 0.0, "gradient_checkpointing": True,
    "tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear",
    "freeze_vit": True, "torch_dtype": None, "use_vllm": False, "vllm_mode": None, "sleep_level": 0,
    "vllm_gpu_memory_utilization": 0.9, "vllm_tensor_parallel_size": 1, "sequence_parallel_size": 1,
    "dataset_shuffle": True, "max_resample_times": 3, "use_hf": False, "soft_max_length": None,
    "cosine_min_len_value_wrong": -0.5, "cosine_max_len_value_wrong": 0.0, "cosine_min_len_value_correct": 1.0,
    "cosine_max_len_value_correct": 0.5, "cosine_max_len": None, "repetition_n_grams": 3, "repetition_max_penalty": -1.0,
}  # fmt: skip
MEGATRON: dict[str, Any] = {
    "micro_batch_size": 1, "global_batch_size": 16, "steps_per_generation": 1, "tuner_type": "full", "use_vllm": True,
    "warmup_ratio": None, "adam_epsilon": 1e-8, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1, "recompute_granularity": "selective",
}  # fmt: skip
"""Defaults of `megatron rlhf` and of Ray's YAML that differ, or are its own."""
OLDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("4.1", {"top_k": 50, "top_p": 0.9}),
    ("3.12", {"vllm_mode": "colocate"}),
    ("3.7", {"gradient_accumulation_steps": None}),
    ("3.6", {"split_dataset_ratio": 0.01}),
    (
        "3.3",
        {
            "adam_beta2": 0.999,
            "loss_type": "bnpo",
            "cosine_min_len_value_wrong": 0.0,
            "cosine_max_len_value_wrong": -0.5,
        },
    ),
)
"""Defaults before a version: the last that applies holds. Without a default, accumulation makes 16 completions."""
RENAMED = {
    "train_type": "tuner_type", "sft_type": "tuner_type", "custom_register_path": "external_plugins",
    "lora_target_modules": "target_modules", "dtype": "torch_dtype", "model_id_or_path": "model",
    "quantization_bit": "quant_bits", "use_flash_attn": "attn_impl", "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length", "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization", "max_model_len": "vllm_max_model_len",
    "max_epochs": "num_train_epochs", "lora_dropout_p": "lora_dropout", "kl_coef": "beta",
    # Megatron
    "lr": "learning_rate", "lr_decay_style": "lr_scheduler_type", "lr_warmup_fraction": "warmup_ratio",
    "lr_warmup_iters": "warmup_steps", "clip_grad": "max_grad_norm", "adam_eps": "adam_epsilon",
    "train_iters": "max_steps",
}  # fmt: skip
"""Older names, and Megatron's for the same."""
VERSION_OF = {"sft_type": "3.2", "train_type": "3.12", "tuner_type": NEWEST}
"""A key that the file uses -> the version to take where none is said: the last that knew it."""

ENVIRONMENT = (
    "NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "USE_HF", "MAX_PIXELS",
    "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "SPATIAL_MERGE_SIZE", "FPS", "FPS_MAX_FRAMES",
    "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM",
)  # fmt: skip
"""Variables that are settings, too (swift/utils/env.py, swift/model/models/qwen.py)."""

SAME = {
    "model_revision": "model.revision", "epsilon": "grpo.epsilon", "epsilon_high": "grpo.epsilon_high",
    "delta": "grpo.delta", "overlong_filter": "grpo.mask_truncated_completions", "num_iterations": "grpo.num_iterations",
    "tau_pos": "grpo.sapo_temperature_pos", "tau_neg": "grpo.sapo_temperature_neg",
    "dataset_shuffle": "grpo.shuffle_dataset", "wandb_log_unique_prompts": "grpo.log_unique_prompts",
    "run_name": "output.name", "output_dir": "output.dir", "adapters": "model.adapter",
    "structured_outputs_regex": "vllm.structured_outputs_regex", "data_seed": "data.seed",
    "off_policy_sequence_mask_delta": "grpo.off_policy_mask_threshold", "temperature": "grpo.temperature",
    "top_p": "grpo.top_p", "max_completion_length": "grpo.max_completion_length",
    "importance_sampling_level": "grpo.importance_sampling_level", "lr_scheduler_type": "grpo.lr_scheduler_type",
    "weight_decay": "grpo.weight_decay", "adam_beta2": "grpo.adam_beta2", "num_train_epochs": "grpo.num_train_epochs",
    "logging_steps": "grpo.logging_steps", "save_steps": "grpo.save_steps", "save_strategy": "grpo.save_strategy",
    "gradient_checkpointing": "grpo.gradient_checkpointing",
}  # fmt: skip
"""The same under our name. Keys of TRL and transformers that are not here pass through under theirs."""
PEFT = {
    "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules",
    "target_regex": "target_modules", "target_parameters": "target_parameters", "modules_to_save": "modules_to_save",
    "lora_bias": "bias", "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip

REFUSED = {
    "multi_turn_scheduler": "rollouts of several turns", "multi_turn_func": "rollouts of several turns",
    "use_gym_env": "rewards of an environment", "gym_env": "rewards of an environment",
    "reward_model": "a reward model", "teacher_model": "a teacher's log-probs as advantages",
    "teacher_model_server": "a teacher's log-probs as advantages",
}  # fmt: skip
"""Another way of training, of which a part says nothing."""
INERT = {
    "rlhf_type": "grpo is read", "use_ray": "how it is started", "load_args": "", "add_version": "names the folder alone",
    "create_checkpoint_symlink": "names the folder alone", "check_model": "", "load_from_cache_file": "",
    "dataset_num_proc": "", "lazy_tokenize": "", "ddp_timeout": "", "remove_unused_columns": "always false with GRPO",
    "dataloader_drop_last": "only whole generation batches are used here, too", "finetune": "", "train_dataloader_shuffle": "",
    "max_turns": "one turn", "vllm_server_pass_dataset": "for rollouts of several turns",
    "completion_length_limit_scope": "for rollouts of several turns", "loss_scale": "the completion is trained on",
    "log_rollout_offpolicy_metrics": "TRL logs sampling/* with its correction", "save_safetensors": "",
    "merge_lora": "grpo-autotune merge does it", "resume_only_model": "", "model_type": "the model folder says it",
    "task_type": "", "save_optim": "", "save_rng": "", "strict": "", "template_backend": "", "reward_model_plugin": "",
    "max_shard_size": "", "safe_serialization": "", "teacher_kl_coef": "no teacher", "nnodes": "",
    "move_model_batches": "", "swanlab_token": "", "hub_token": "", "use_gym_env": "", "multi_turn_scheduler": "",
}  # fmt: skip
"""Keys without effect on what is learned, and on its speed here; or without effect as they stand, when false or null."""
SPEED = {
    "offload_model": "the trainer's weights stay on the GPU while the engine runs",
    "offload_optimizer": "the optimizer's state stays on the GPU while the engine runs",
    "offload_bridge": "Megatron's", "padding_free": "TRL pads; the speed-ups leave most of it out",
    "packing": "TRL pads; the speed-ups leave most of it out", "use_logits_to_keep": "TRL computes no other logits",
    "vit_gradient_checkpointing": "with gradient_checkpointing", "ds3_gather_for_generation": "ZeRO 3's",
    "enable_flattened_weight_sync": "vllm.weight_sync chooses", "gc_collect_after_offload": "nothing is offloaded",
    "sequence_parallel": "Megatron's", "attention_backend": "Megatron's kernel; model.attn_implementation chooses ours",
    "recompute_method": "Megatron's", "recompute_num_layers": "Megatron's", "recompute_modules": "Megatron's",
    "gradient_accumulation_fusion": "Megatron's", "cross_entropy_loss_fusion": "Megatron's",
    "moe_permute_fusion": "Megatron's", "moe_grouped_gemm": "Megatron's", "moe_shared_expert_overlap": "Megatron's",
    "expert_model_parallel_size": "Megatron's: experts are not spread over GPUs here",
    "expert_tensor_parallel_size": "Megatron's", "optimizer_cpu_offload": "Megatron's",
    "use_precision_aware_optimizer": "Megatron's", "overlap_grad_reduce": "Megatron's",
    "overlap_param_gather": "Megatron's", "use_distributed_optimizer": "Megatron's",
    "zero_hpz_partition_size": "ZeRO++", "experts_impl": "the model's own", "enable_npu_model_patch": "for NPUs",
    "teacher_deepspeed": "no teacher", "offload_teacher_model": "no teacher", "use_async_engine": "TRL's engine is synchronous",
    "device_map": "", "dataloader_pin_memory": "",
}  # fmt: skip
DROPPED = {
    "async_generate": "there each step trains on completions of the weights before the last step; here on those of its own",
    "template": "the chat template of the model folder is used; data.chat_template gives another",
    "agent_template": "the chat template of the model folder is used; data.chat_template gives another",
    "kl_in_reward": "the KL term is in the loss here, not in the reward", "freeze_llm": "the language model is always trained",
    "response_prefix": "write it into data.chat_template", "reward_adapters": "no reward model",
    "freeze_parameters": "only the vision tower can be frozen", "freeze_parameters_ratio": "only the vision tower can be frozen",
    "trainable_parameters": "name layers in peft.target_modules", "interleave_prob": "data.mix has weights",
    "vit_lr": "one learning rate for all weights", "aligner_lr": "one learning rate for all weights",
    "cached_dataset": "name the data itself", "custom_dataset_info": "name the data itself", "streaming": "data is loaded whole",
    "loss_weights": "of DPO", "ref_model": "the reference is the model at the start",
    "ref_adapters": "model.adapter_reference says which model the reference is", "advantage_reweight": "RLSD is not in TRL",
    "chord_sft_dataset": "CHORD adds a loss of supervised answers, which is left out",
    "sdar_loss_coef": "SDAR adds a distillation loss, which is left out", "min_lr": "", "model_kwargs": "",
    "moe_aux_loss_coeff": "grpo.router_aux_loss_coef, where the model has such a loss",
    "moe_expert_capacity_factor": "tokens beyond an expert's capacity are not left out here",
}  # fmt: skip
IGNORED = ("swanlab_", "wandb_", "tensorboard_", "eval_use_", "galore_", "lora_ga_", "lisa_", "hub_", "chord_", "rlsd_", "sdar_",
           "fipo_", "real_", "teacher_", "ray_", "colocate_", "device_groups", "train.gpus", "rollout.gpus", "teacher.")  # fmt: skip
"""Beginnings of keys that go with one that was said something of."""
NO_LOSS = {"real": "REAL", "fipo": "FIPO"}
VISION = r"(?i)vl\b|-vl|vision|omni|internvl|llava|gemma-?[34]|qwen3\.[5-9]|ovis|minicpm-?[vo]|glm-4.*v|pixtral|paligemma|kimi-vl"
"""Names of models that see images; a folder says it in its config.json."""
