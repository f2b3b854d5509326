"""Keys of ms-swift as tables: defaults by version, older names, and what becomes of those that need no thought.

Read in modelscope/ms-swift at 3602360 (4.5) and at its tags from v3.2.0 on: swift/arguments,
swift/trainers/arguments.py, swift/rlhf_trainers/{arguments,args_mixin,grpo_trainer}.py,
swift/megatron/arguments/megatron_args.py.
"""

from fnmatch import fnmatchcase
from typing import Any

from grpo_autotune.records.imported import Verdict

NEWEST = "4.5"
GROUPS = ("train", "rollout", "teacher")  # roles of Ray's YAML, each with keys of its own
VARIABLES = ("ENV", "model_kwargs")  # mappings whose keys are variables of the process

DEFAULTS: dict[str, Any] = {
    "num_generations": 8, "beta": 0.04, "temperature": 0.9, "top_p": 1.0, "top_k": -1, "loss_type": "grpo",
    "scale_rewards": "group", "importance_sampling_level": "token", "num_iterations": 1, "max_completion_length": 512,
    "truncation_strategy": "left", "advantage_estimator": "grpo", "rollout_importance_sampling_threshold": 2.0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "sequence_parallel_size": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "num_train_epochs": 3, "logging_steps": 5, "save_strategy": "steps", "save_steps": 500,
    "gradient_checkpointing": True, "tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05,
    "target_modules": "all-linear", "freeze_vit": True, "freeze_aligner": True,
    "vllm_gpu_memory_utilization": 0.9, "dataset_shuffle": True,
    "vllm_tensor_parallel_size": 1, "max_resample_times": 3, "repetition_n_grams": 3, "repetition_max_penalty": -1.0,
    "cosine_min_len_value_wrong": -0.5, "cosine_max_len_value_wrong": 0.0, "cosine_min_len_value_correct": 1.0,
    "cosine_max_len_value_correct": 0.5,
}  # fmt: skip
MEGATRON: dict[str, Any] = {  # defaults of `megatron rlhf` and Ray that differ, or are its own
    "micro_batch_size": 1, "global_batch_size": 16, "steps_per_generation": 1, "tuner_type": "full", "use_vllm": True,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "num_train_epochs": None,
}  # fmt: skip
OLDER: tuple[tuple[str, dict[str, Any]], ...] = (  # defaults before a version
    ("4.0.3", {"top_k": 50, "top_p": 0.9}),
    ("3.7", {"gradient_accumulation_steps": None}),  # as many as make 16 completions
    ("3.6", {"split_dataset_ratio": 0.01}),
    ("3.5", {"num_infer_workers": 1}),  # GPUs of the engine on each node, beside those of the trainer
    ("3.4", {"loss_type": "bnpo"}),
    ("3.2.2", {"adam_beta2": 0.999, "cosine_min_len_value_wrong": 0.0, "cosine_max_len_value_wrong": -0.5}),
)
VERSION_OF = {  # key -> the last version that heeded it, the earliest first
    "sft_type": "3.2", "mini_batch_size": "3.3", "use_lmdeploy": "3.4", "num_infer_workers": "3.4",
    "vllm_device": "3.4", "train_type": "3.12", "log_interval": "3.12", "save_interval": "3.12", "num_workers": "3.12",
}  # fmt: skip

RENAMED = {  # older names, and Megatron's, for a key
    "train_type": "tuner_type", "sft_type": "tuner_type", "custom_register_path": "external_plugins",
    "max_new_tokens": "max_completion_length", "response_length": "max_completion_length",
    "max_epochs": "num_train_epochs", "tensor_parallel_size": "vllm_tensor_parallel_size", "ckpt_dir": "model",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    # Megatron's
    "lr": "learning_rate", "lr_decay_style": "lr_scheduler_type", "lr_warmup_fraction": "warmup_ratio",
    "lr_warmup_iters": "warmup_steps", "clip_grad": "max_grad_norm", "adam_eps": "adam_epsilon",
    "train_iters": "max_steps", "log_interval": "logging_steps", "save_interval": "save_steps",
    "eval_interval": "eval_steps", "num_workers": "dataloader_num_workers", "save": "output_dir",
}  # fmt: skip
PIXELS = {  # variables that limit images, in pixels or in tokens
    "MAX_PIXELS": "data.max_pixels", "IMAGE_MAX_TOKEN_NUM": "data.max_pixels", "MIN_PIXELS": "data.min_pixels",
    "IMAGE_MIN_TOKEN_NUM": "data.min_pixels",
}  # fmt: skip
PATCHES_OF_28 = r"(?i)qwen-?2(\.5)?-?(vl|omni)"  # models with tokens of 28 x 28 pixels; others have 32 x 32
ENVIRONMENT = (*PIXELS, "NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "USE_HF")

PEFT = {
    "lora_rank": "peft.r", "lora_alpha": "peft.lora_alpha", "lora_dropout": "peft.lora_dropout",
    "target_modules": "peft.target_modules", "target_regex": "peft.target_modules",
    "target_parameters": "peft.target_parameters", "modules_to_save": "peft.modules_to_save",
    "lora_bias": "peft.bias", "use_rslora": "peft.use_rslora", "use_dora": "peft.use_dora",
}  # fmt: skip
LISTS = ("target_modules", "target_parameters", "modules_to_save")
SAME = {
    "model_revision": "model.revision", "torch_dtype": "model.dtype", "output_dir": "output.dir",
    "data_seed": "data.seed", "max_pixels": "data.max_pixels", "overlong_filter": "grpo.mask_truncated_completions",
    "tau_pos": "grpo.sapo_temperature_pos", "tau_neg": "grpo.sapo_temperature_neg", "min_p": "grpo.min_p",
    "dataset_shuffle": "grpo.shuffle_dataset", "wandb_log_unique_prompts": "grpo.log_unique_prompts",
    "off_policy_sequence_mask_delta": "grpo.off_policy_mask_threshold", "vllm_server_host": "vllm.server_host",
    "vllm_server_base_url": "vllm.server_base_url", "vllm_server_port": "vllm.server_port",
    "vllm_server_timeout": "vllm.server_timeout", "vllm_server_group_port": "vllm.group_port",
    "structured_outputs_regex": "vllm.structured_outputs_regex", "attn_impl": "model.attn_implementation",
    **{key: f"grpo.{key}" for key in (
        "loss_type", "temperature", "top_p", "max_completion_length", "importance_sampling_level", "lr_scheduler_type",
        "weight_decay", "adam_beta2", "max_grad_norm", "num_train_epochs", "logging_steps", "save_strategy",
        "save_steps", "gradient_checkpointing", "scale_rewards", "top_k",
    )},
}  # fmt: skip
"""The same under our name, or under TRL's with another default. Other keys of TRL, transformers and vLLM pass through
under their own."""
SPELLED: dict[str, dict[Any, Any]] = {  # values that are spelled otherwise
    "attn_impl": {"flash_attn": "flash_attention_2"}, "scale_rewards": {True: "group", False: "none"}, "top_k": {-1: 0},
}  # fmt: skip
FIXED = {"quant_method": "bnb", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""How `model.load_in_4bit` loads."""

REFUSED = {
    "multi_turn_scheduler": "rollouts of several turns", "multi_turn_func": "rollouts of several turns",
    "use_gym_env": "rewards of an environment", "gym_env": "rewards of an environment",
    "reward_model": "a reward model",
    "teacher_model": "a teacher model", "teacher_model_server": "a teacher model",
}  # fmt: skip
LOSSES = {"grpo": False, "bnpo": False, "dr_grpo": False, "sapo": False, "dapo": True, "cispo": True}
"""Losses that TRL has by the same formula -> True where the tokens of a whole rollout divide it."""
READ = {"rlhf_type": ["grpo"], "advantage_estimator": ["grpo"], "loss_type": list(LOSSES)}  # values that TRL has too
NEARLY = {  # what differs in a part of the loss
    "overlong_filter": "tokens that are left out still divide the loss there, and do not here",
    "top_entropy_quantile": "the threshold is that of one rank's micro batch there, and of all ranks' here",
    "off_policy_sequence_mask_delta": "sequences that are left out keep their KL term here",
}
PREPARED = "clevr_cogen_a_train|Countdown-Tasks-3to4|xlam-function-calling-60k"
"""Data sets of GRPO whose prompts swift writes in its own code (swift/dataset/dataset)."""
VISION = r"(?i)vl\b|vl[-_\d]|vision|omni|llava|gemma-?[34]|qwen3\.[5-9]|ovis|minicpm-?[vo]|pixtral|paligemma"
"""Names of models that see images."""

KEYS: tuple[tuple[Verdict, str, str], ...] = (  # a key's fate where it is on; the first that fits is it
    ("same", "nothing that the run depends on", """
        use_ray ray_exp_name load_args add_version create_checkpoint_symlink check_model strict streaming
        dataset_num_proc load_from_cache_file lazy_tokenize ddp_timeout finetune no_save_* no_load_* ENV merge_lora
        save_safetensors load_safetensors model_type task_type max_shard_size max_turns completion_length_limit_scope
        swanlab_* reward_model_plugin save_missing_weights download_mode nnodes colocate_groups config USE_HF use_hf
        logging_dir hub_token log_entropy wandb_project wandb_exp_name tensorboard_dir"""),
    ("same", "as here", """
        rlhf_type remove_unused_columns dataloader_drop_last train_dataloader_shuffle loss_scale advantage_estimator
        log_rollout_offpolicy_metrics freeze_aligner"""),
    ("same", "the batch says it", "NNODES"),
    ("same", "of PPO", "kl_coef cliprange cliprange_value vf_coef gamma lam num_ppo_epochs whiten_rewards"),
    ("same", "a variable of the process, and no setting", "ENV.* model_kwargs.*"),
    ("speed", "the trainer stays on the GPU while the engine runs", "offload_model offload_optimizer"),
    ("speed", "TRL pads; the speed-ups leave most of it out", "padding_free packing"),
    ("speed", "chosen here by itself", """
        vllm_max_lora_rank vllm_data_parallel_size vllm_use_async_engine vllm_disable_custom_all_reduce
        move_model_batches enable_flattened_weight_sync gc_collect_after_offload use_logits_to_keep
        vit_gradient_checkpointing ds3_gather_for_generation zero_hpz_partition_size experts_impl"""),
    ("speed", "Megatron's", """
        offload_bridge sequence_parallel attention_backend recompute_* gradient_accumulation_fusion overlap_*
        cross_entropy_loss_fusion moe_permute_fusion moe_grouped_gemm moe_shared_expert_overlap manual_gc optimizer_*
        expert_model_parallel_size expert_tensor_parallel_size use_precision_aware_optimizer
        use_distributed_optimizer"""),
    ("speed", "GPUs of the engine", "vllm_device num_infer_workers lmdeploy_device"),
    ("none", "--resume goes on from a checkpoint of grpo-autotune", "resume_from_checkpoint"),
    ("none", "the model folder's chat template is used; model.chat_template gives another",
     "template agent_template response_prefix preserve_thinking"),
    ("none", "a step trains on completions of the step before there", "async_generate"),
    ("none", "a server may roll out several turns; here it is one", "vllm_server_pass_dataset"),
    ("none", "the KL term is in the loss here, not in the reward", "kl_in_reward"),
    ("none", "of the model's parts, only the vision tower can be frozen",
     "freeze_llm freeze_parameters* trainable_parameters*"),
    ("none", "4 bits of bitsandbytes alone", "quant_bits hqq_axis"),
    ("none", "one learning rate for all weights", "vit_lr aligner_lr"),
    ("none", "CHORD's loss of supervised answers is left out", "chord_*"),
    ("none", "this term of the loss is left out", "sdar_loss_coef advantage_reweight moe_aux_loss_coeff"),
    ("none", "experts take all their tokens here", "moe_expert_capacity_factor"),
    ("none", "AdamW takes its place", "optimizer"),
    ("none", "a mixture takes its parts as they are", "interleave_prob stopping_strategy"),
    ("none", "adapters begin as peft makes them", "init_weights init_strategy lora_dtype"),
    ("none", "the schedule is that of all steps, from a rate of 0", "lr_decay_iters lr_warmup_init"),
    ("none", "each of them is one backward pass there, and their gradients are added", "mini_batch_size"),
    ("same", "without effect as the file stands", "teacher* fipo_* real_* rlsd_* sdar_* rollout.* train.*"),
)  # fmt: skip


def verdict_of(key: str) -> tuple[Verdict, str] | None:
    """The verdict of such a key, and its note."""
    fits = ((verdict, note) for verdict, note, names in KEYS for name in names.split() if fnmatchcase(key, name))
    return next(fits, None)
