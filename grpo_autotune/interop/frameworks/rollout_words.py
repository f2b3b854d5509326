"""Keys of verl and of EasyR1, its fork, as tables: those with a part in the arithmetic by our names, those with the
same meaning, and words on those that need no thought. A key's first part stands for what is before it (`PREFIXES`).
"""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any, cast

from grpo_autotune.records.imported import Verdict

PREFIXES: Mapping[str, Mapping[str, str]] = {
    "verl": dict.fromkeys(("actor", "model", "rollout", "ref"), "actor_rollout_ref.")
    | {"optim": "actor_rollout_ref.actor."},
    "easyr1": dict.fromkeys(("actor", "rollout", "ref", "critic", "reward", "hybrid_engine"), "worker.")
    | {"model": "worker.actor.", "optim": "worker.actor."},
}
Keys = namedtuple(  # one framework's names; those at the end are the same in both
    "Keys",
    "prompts mini dual warmup_ratio steps keep val rank alpha adapted kept_out parallel "
    "group passes nodes gpus low high warmup_steps schedule least_rate epochs save val_first logger run memory top_k "
    "longest_prompt longest_completion filter_prompts overflow train_files val_files",
    defaults=(
        "rollout.n", "actor.ppo_epochs", "trainer.nnodes", "trainer.n_gpus_per_node", "actor.clip_ratio_low",
        "actor.clip_ratio_high", "optim.lr_warmup_steps", "optim.lr_scheduler_type", "optim.min_lr_ratio",
        "trainer.total_epochs", "trainer.save_freq", "trainer.val_before_train", "trainer.logger",
        "trainer.experiment_name", "rollout.gpu_memory_utilization", "rollout.top_k", "data.max_prompt_length",
        "data.max_response_length", "data.filter_overlong_prompts", "data.truncation", "data.train_files",
        "data.val_files",
    ),
)  # fmt: skip
KEYS = {
    "verl": Keys(
        "data.train_batch_size", "actor.ppo_mini_batch_size", "actor.clip_ratio_c", "optim.lr_warmup_steps_ratio",
        "trainer.total_training_steps", "trainer.max_actor_ckpt_to_keep", "trainer.test_freq", "model.lora_rank",
        "model.lora_alpha", "model.target_modules", "model.exclude_modules", "rollout.tensor_model_parallel_size",
    ),
    "easyr1": Keys(
        "data.rollout_batch_size", "actor.global_batch_size", "actor.clip_ratio_dual", "optim.lr_warmup_ratio",
        "trainer.max_steps", "trainer.save_limit", "trainer.val_freq", "model.lora.rank", "model.lora.alpha",
        "model.lora.target_modules", "model.lora.exclude_modules", "rollout.tensor_parallel_size",
    ),
}  # fmt: skip
SAME: Mapping[str, Mapping[str, str]] = {  # settings with the same meaning under another name
    "verl": {
        "model.path": "model.name_or_path", "model.trust_remote_code": "model.trust_remote_code",
        "model.override_config.attn_implementation": "model.attn_implementation",
        "model.custom_chat_template": "model.chat_template",
        "model.enable_gradient_checkpointing": "grpo.gradient_checkpointing", "optim.lr": "grpo.learning_rate",
        "actor.freeze_vision_tower": "model.freeze_vision_tower", "actor.entropy_coeff": "grpo.entropy_coef",
        "optim.weight_decay": "grpo.weight_decay", "rollout.temperature": "grpo.temperature",
        "rollout.top_p": "grpo.top_p", "rollout.quantization": "vllm.quantization",
        "rollout.max_model_len": "vllm.max_model_len", "rollout.limit_images": "vllm.limit_mm_per_prompt.image",
        "data.shuffle": "grpo.shuffle_dataset", "data.seed": "grpo.seed",
    },
    "easyr1": {
        "model.model_path": "model.name_or_path", "model.trust_remote_code": "model.trust_remote_code",
        "model.freeze_vision_tower": "model.freeze_vision_tower", "rollout.max_model_len": "vllm.max_model_len",
        "model.override_config.attn_implementation": "model.attn_implementation", "optim.lr": "grpo.learning_rate",
        "model.enable_gradient_checkpointing": "grpo.gradient_checkpointing", "rollout.top_p": "grpo.top_p",
        "actor.entropy_coeff": "grpo.entropy_coef", "actor.max_grad_norm": "grpo.max_grad_norm",
        "optim.weight_decay": "grpo.weight_decay", "rollout.temperature": "grpo.temperature", "data.seed": "grpo.seed",
        "data.shuffle": "grpo.shuffle_dataset", "data.image_dir": "data.image_root",
        **{f"data.{name}": f"data.{name}" for name in ("max_pixels", "min_pixels", "system_prompt")},
    },
}  # fmt: skip
FAST = {  # settings of the rollout that change seconds alone, and are vLLM's own
    "verl": "max_num_batched_tokens max_num_seqs enable_prefix_caching enable_chunked_prefill enforce_eager "
            "cudagraph_capture_sizes",
    "easyr1": "max_num_batched_tokens max_num_seqs enforce_eager enable_chunked_prefill",
}  # fmt: skip
WORDS_OF_BOTH = """
speed | where weights and the optimizer lie: `grpo.fsdp_config` and `grpo.deepspeed` for several GPUs | actor.strategy
speed | no part of what is learned | trainer.balance_batch .default_hdfs_dir .del_local_ckpt_after_load
    .val_generations_to_log_to_wandb data.filter_overlong_prompts_workers .val_batch_size
same | PPO's, without effect with grpo | critic. trainer.critic_warmup algorithm.gamma .lam
none | completions end at the end token | rollout.ignore_eos
none | grpo-autotune infer evaluates alone | trainer.val_only
"""
WORDS = {  # verdict, note, and keys or beginnings of keys, where nothing else was said; `.b` behind `a.c` is `a.b`
    "verl": """
speed | TRL pads a micro batch to its longest completion; `speedups: auto` forwards a prompt once |
    model.use_remove_padding actor.use_remove_padding .use_prefix_grouper .pad_to_length
speed | another kernel for the same numbers | model.use_fused_kernels .fused_kernel_options. .use_liger .tiled_mlp.
    .enable_activation_offload actor.entropy_ .use_fused_kernels .use_torch_compile ref.entropy_ .use_torch_compile
speed | where weights and the optimizer lie: `grpo.fsdp_config` and `grpo.deepspeed` for several GPUs |
    actor.fsdp_config.
    .fsdp_size .megatron. .veomni. .engine. .torchtitan. .automodel. .model_engine .load_weight ref.torchtitan.
    .automodel. .fsdp_config. .megatron. .veomni. .strategy .ulysses_sequence_parallel_size model_engine actor@ ref@
    optim.override_optimizer_config.
speed | passes without gradient use per_device_train_batch_size | ref. rollout.log_prob_
speed | how the source runs its engine | rollout.mode .data_parallel_size .expert_parallel_size
    .pipeline_model_parallel_size .moe_tensor_parallel_size .checkpoint_engine. .nnodes .n_gpus_per_node
    .multi_stage_wake_up .disable_log_stats .skip_tokenizer_init .trace. .seed .prometheus.
    .scheduling_policy .over_sample_rate .agent. .dtype .layered_summon .engine_kwargs. .swap_space .chat_scheduler
speed | grpo-autotune probe measures | actor.profiler. ref.profiler. rollout.profiler. global_profiler.
speed | no part of what is learned | trainer.device .esi_redundant_time .log_val_generations .max_actor_ckpt_to_keep
    .max_critic_ckpt_to_keep .ray_ .npu_profile. .remove_previous_ckpt_in_save .rollout_data_dir .validation_data_dir
    .use_legacy_worker_impl .use_v1 .v1. .profile_ .nccl_timeout model.use_shm .lora.merge data.use_shm
    .validation_shuffle .dataloader_num_workers .gen_batch_size skip. actor.calculate_entropy .checkpoint. ray_kwargs.
    ray_init. transfer_queue. hydra. defaults actor_rollout_ref.nccl_timeout
speed | the run folder is output.dir | trainer.default_local_dir
speed | grpo-autotune train --resume | trainer.resume_mode
speed | the tracker's own variable, such as WANDB_PROJECT | trainer.project_name
speed | how a reward is called | reward. reward_model. custom_reward_function. reward_manager.
same | TRL shuffles the completions of each rollout | actor.shuffle .data_loader_seed
same | the source sets it when it starts | optim.total_training_steps rollout.prompt_length .response_length
same | the engine's weights come from the trainer before the first rollout | rollout.load_format
same | goes with algorithm.filter_groups.enable | algorithm.filter_groups.
same | goes with algorithm.rollout_correction.rollout_is | algorithm.rollout_correction. rollout.calculate_log_probs
same | evaluation's sampling | rollout.val_kwargs.
same | one turn, sampled | rollout.multi_turn. .do_sample
same | goes with the schedule | optim.num_cycles .zero_indexed_step .min_lr_ratio
same | verl reads it under `actor.` | actor.policy_loss.tau_
same | of KL in the reward alone | algorithm.kl_ctrl. .kl_penalty
same | the model's processor knows it | data.image_patch_size
same | for the source's own code | data.return_ .trust_remote_code
same | rows with videos or sound are not read here | data.video_key .audio_key
none | KL in the reward: TRL has it in the loss alone (grpo.beta) | algorithm.use_kl_in_reward
none | a row's experts in the rollout are not replayed in training | actor.router_replay.mode
    .megatron.router_replay.mode .veomni.router_replay.mode rollout.enable_rollout_routing_replay
none | the router's loss is that of the model's own configuration |
    actor.megatron.override_transformer_config.moe_aux_loss_coeff .megatron.override_transformer_config.moe_z_loss_coeff
none | TRL's AdamW has no such setting | optim. actor.qat.
none | grpo-autotune train --resume, of its own checkpoints | trainer.resume_from_path
none | the model's own configuration holds | model.override_config. .tokenizer_path .hf_config_path .external_lib
    data.tokenizer
none | Megatron's LoRA is not read: set a peft section by hand | model.lora.
none | TRL trains no heads that predict several tokens | model.mtp.
none | data in code: write the rows to a file | data.custom_cls. .sampler. .datagen.
none | TRL corrects by importance weights alone | algorithm.rollout_correction.rollout_rs
    .rollout_correction.rollout_rs_threshold .rollout_correction.rollout_rs_threshold_lower
    .rollout_correction.rollout_token_veto_threshold .rollout_correction.bypass_mode
    .rollout_correction.rollout_is_batch_normalize
""",
    "easyr1": """
speed | where weights and the optimizer lie: `grpo.fsdp_config` and `grpo.deepspeed` for several GPUs |
    actor.fsdp. .offload.
    ref. hybrid_engine
speed | TRL pads a micro batch to its longest completion | actor.padding_free
speed | a micro batch of the source holds more completions where they are short | actor.dynamic_batching
speed | passes without gradient use per_device_train_batch_size | actor.micro_batch_size_per_device_for_experience
speed | the run folder is output.dir | trainer.save_checkpoint_path
speed | the engine's room for images follows from the data | rollout.limit_images
speed | no part of what is learned | trainer.val_generations_to_log .ray_timeline .find_last_checkpoint
    .remove_previous_ckpt .remove_ckpt_after_load .project_name .save_limit rollout.name .dtype .seed .disable_
    .free_cache_engine .trust_remote_code reward.num_cpus .reward_type .skip_special_tokens actor.use_torch_compile
    data.mini_rollout_batch_size .return_raw_
same | goes with algorithm.online_filtering | algorithm.filter_ trainer.max_try_make_batch
same | off | algorithm.online_filtering .disable_kl
same | of KL in the reward, in the row of use_kl_loss | algorithm.kl_
same | the source sets it when it starts | optim.training_steps
same | the file under these settings | config
same | rows with videos are not read here | data.video_
none | the model's own is taken | model.override_config. .tokenizer_path
none | checkpoints hold the optimizer, so that training can go on | trainer.save_model_only
none | grpo-autotune train --resume, of its own checkpoints | trainer.load_checkpoint_path
""",
}


def spelled(framework: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of keys with what is in front of each."""
    return {PREFIXES[framework].get(key.partition(".")[0], "") + key: value for key, value in table.items()}


def keys_of(framework: str) -> Keys:
    """The framework's names, whole."""
    return Keys(*(next(iter(spelled(framework, {key: None}))) for key in KEYS[framework]))


def words_of(framework: str) -> dict[str, tuple[Verdict, str]]:
    """Key, or beginning of keys, -> verdict and note."""
    table: dict[str, tuple[Verdict, str]] = {}
    for row in (WORDS_OF_BOTH + WORDS[framework]).replace("\n    ", " ").split("\n"):
        verdict, _, rest = row.partition(" | ")
        note, _, keys = rest.partition(" | ")
        section = ""
        for key in keys.split():
            section = section if key[0] == "." else key.partition(".")[0]
            table[section + key if key[0] == "." else key] = (cast(Verdict, verdict), note)
    return spelled(framework, table)
