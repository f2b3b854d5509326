"""Fates of keys that people bring: those of older TRL, transformers and vLLM, and what other programs call ours.

Sources:

- TRL: the fields of `GRPOConfig`, `ModelConfig` and `ScriptArguments` at each tag of github.com/huggingface/trl from
  v0.14.0, the first with GRPO, against TRL 1.16 as installed; removed in commits a8cfca6 (#3364, v0.18), bfd25d1
  (#4651, v0.27) and 89070d2 (#4847, v0.28).
- transformers: MIGRATION_GUIDE_V5.md, section Trainer, against `TrainingArguments` 5.23.
- vLLM, PPO trainers, Unsloth and verl: names in common use, held against `EngineArgs` 0.31 (`vllm_names`) alone.
"""

_ELSEWHERE = {
    "model.name_or_path": "model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype",
    "model.chat_template": "chat_template chat_template_path custom_chat_template",
    "data.path": "dataset_name dataset_path train_dataset",
    "data.eval_path": "eval_dataset",
    "data.name": "dataset_config dataset_config_name",
    "data.split": "dataset_train_split",
    "data.eval_split": "dataset_test_split",
    "data.columns": "dataset_prompt_column",
    "rewards": "reward_funcs reward_functions",
    "peft": "peft_config lora_config lora",
    "peft.r": "lora_r lora_rank rank",
    "peft.lora_alpha": "alpha",
    "peft.lora_dropout": "dropout",
    "peft.target_modules": "lora_target_modules",
    "peft.target_parameters": "lora_target_parameters",
    "peft.modules_to_save": "lora_modules_to_save",
    "peft.task_type": "lora_task_type",
    "grpo.use_liger_kernel": "use_liger_loss",
    "grpo.log_unique_prompts": "wandb_log_unique_prompts",
    "vllm.dtype": "vllm_dtype",
    "vllm.enable_prefix_caching": "vllm_enable_prefix_caching",
    "vllm.structured_outputs_regex": "vllm_guided_decoding_regex guided_decoding_regex",
    "vllm.max_model_len": "vllm_max_model_len max_model_length",
    "grpo.eval_strategy": "evaluation_strategy",
    "grpo.use_cpu": "no_cuda",
    "grpo.per_device_train_batch_size": "per_gpu_train_batch_size",
    "grpo.per_device_eval_batch_size": "per_gpu_eval_batch_size",
    "grpo.hub_token": "push_to_hub_token",
    "grpo.hub_model_id": "push_to_hub_model_id push_to_hub_organization",
    "grpo.include_for_metrics": "include_inputs_for_metrics",
    "grpo.include_num_input_tokens_seen": "include_tokens_per_second",
    "grpo.fsdp_config": "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    "grpo.accelerator_config": "dispatch_batches split_batches",
    "grpo.debug": "tpu_metrics_debug",
    "grpo.torch_compile_backend": "torchdynamo",
    "grpo.ddp_backend": "xpu_backend",
    "vllm.structured_outputs_config": "guided_decoding_backend",
    "vllm.max_cudagraph_capture_size": "max_seq_len_to_capture",
    "vllm.speculative_config": "num_speculative_tokens speculative_model",
    "vllm.hf_overrides": "rope_scaling rope_theta",
    "vllm.runner": "task",
    "grpo.epsilon": "cliprange clip_range epsilon_low",
    "grpo.use_vllm": "fast_inference",
    "grpo.num_generations": "group_size num_return_sequences",
    "grpo.beta": "kl_coef",
    "grpo.learning_rate": "lr",
    "grpo.max_completion_length": "max_new_tokens max_response_length response_length",
    "grpo.num_train_epochs": "num_epochs",
    "grpo.num_iterations": "num_ppo_epochs",
    "grpo.gradient_checkpointing": "use_gradient_checkpointing",
}
"""Our key path -> the keys that hold the same in TRL's command line and trainers, TRL, transformers, vLLM and other
trainers (TRL's PPO and RLOO, Unsloth, OpenRLHF, verl)."""
MOVED = {old: new for new, olds in _ELSEWHERE.items() for old in olds.split()}
"""Key -> the key path that holds the same here."""

_MODEL_FOLDER = "it comes with the model folder, model.name_or_path"
_REWARD = "a reward is a function (rewards[].name: package.module:function), which may call a model"
_FOUR_BIT = "model.load_in_4bit loads NF4 with double quantization; there is no other setting"
_MICRO_BATCH = "completions per device and micro step are grpo.per_device_train_batch_size"
_PROCESSES = "start one process per GPU: torchrun --nproc_per_node N -m grpo_autotune ..."
_LENGTHS = "completions are limited by grpo.max_completion_length, prompts by data.max_prompt_tokens"

SAID = {
    # TRL
    "max_prompt_length": "TRL removed it in 0.28: write data.max_prompt_tokens, and data.prompt_overflow: left",
    "vllm_device": "TRL removed it in 0.18: the engine is on the trainer's GPUs, or at a server (vllm.mode)",
    "use_peft": "write a peft section, such as peft: {r: 16, target_modules: all-linear}; null trains the whole model",
    "processing_class": _MODEL_FOLDER,
    "tokenizer": _MODEL_FOLDER,
    "reward_model": _REWARD,
    "reward_model_name_or_path": _REWARD,
    "gradient_checkpointing_use_reentrant": "write grpo.gradient_checkpointing_kwargs: {use_reentrant: ...}",
    "load_in_8bit": _FOUR_BIT,
    "quantization_config": _FOUR_BIT,
    "bnb_4bit_quant_type": _FOUR_BIT,
    "bnb_4bit_quant_storage": _FOUR_BIT,
    "bnb_4bit_compute_dtype": "the type of computing is model.dtype",
    "bnb_4bit_use_double_quant": _FOUR_BIT,
    "use_bnb_nested_quant": _FOUR_BIT,
    # transformers
    "adafactor": "write grpo.optim: adafactor",
    "group_by_length": "GRPO keeps groups together; the speed-up length_sort deals micro batches by length",
    "logging_dir": "transformers 5 removed it: TensorBoard's folder is the variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "transformers 5 removed it: go on with --resume, or give another folder with --out",
    "save_safetensors": "transformers 5 removed it: weights are always saved as safetensors",
    "warmup_ratio": "transformers 5 removed it: grpo.warmup_steps below 1 is a share of all steps",
    # other programs
    "batch_size": _MICRO_BATCH,
    "train_batch_size": _MICRO_BATCH,
    "max_length": _LENGTHS,
    "max_seq_length": _LENGTHS,
    "num_gpus": _PROCESSES,
    "num_processes": _PROCESSES,
    "wandb_entity": "it is the environment variable WANDB_ENTITY",
    "wandb_project": "it is the environment variable WANDB_PROJECT",
}
"""Key -> what became of it, or how it is said here."""

_TRANSFORMERS = """
    fp16_backend fp16_opt_level half_precision_backend jit_mode_eval mp_parameters past_index ray_scope sharded_ddp
    tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device
"""
_VLLM = """
    disable_async_output_proc enable_prompt_adapter long_lora_scaling_factors lora_extra_vocab_size
    max_prompt_adapter_token max_prompt_adapters multi_step_stream_outputs num_lookahead_slots num_scheduler_steps
    preemption_mode qlora_adapter_name_or_path swap_space use_v2_block_manager worker_use_ray
"""


def fate(key: str) -> str | None:
    """Advice for a key that is none of ours, as a sentence; None where nothing is known of it."""
    if key in MOVED:
        return f"Use {MOVED[key]}."
    for library, removed in (("transformers", _TRANSFORMERS), ("vLLM", _VLLM)):
        if key in removed.split():
            return f"{library} has removed this key: delete it."
    said = SAID.get(key)
    return f"{said[0].upper()}{said[1:]}." if said else None
