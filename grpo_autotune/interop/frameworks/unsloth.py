"""Unsloth: scripts and notebooks around TRL's trainer, whose defaults and batch sizes it changes.

Source: `unsloth/models/rl.py` (what it puts over `GRPOConfig`), and the signatures of `FastLanguageModel`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.interop.frameworks import trl_script
from grpo_autotune.interop.frameworks.trl import translated
from grpo_autotune.interop.frameworks.trl_keys import Handler, Version, choose, inert, off, speed
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

OVER = {  # defaults over those of TRL
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 8, "learning_rate": 5e-5,
    "weight_decay": 0.001, "warmup_ratio": 0.1, "seed": 3407, "optim": "adamw_8bit", "logging_steps": 1,
    "per_device_eval_batch_size": 4, "loss_type": "bnpo", "beta": 0.001, "top_k": 0, "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": False, "bf16": None, "gradient_checkpointing": True,
    "load_in_4bit": True, "gpu_memory_utilization": 0.5, "dtype": "bfloat16",
    "lora_r": 16, "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
MEMORY = ("unsloth_num_chunks", "unsloth_grpo_mini_batch", "unsloth_logit_chunk_multiplier", "max_lora_rank",
          "offload_embedding", "device_map_planner_kwargs", "unsloth_vllm_standby", "float8_kv_cache",
          "disable_log_stats", "random_state", "use_exact_model_name")  # fmt: skip
LAYERS = ("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules")
BATCH = ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
SAMPLING = ("min_p", "top_p", "top_k", "temperature", "repetition_penalty")


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of an Unsloth script or notebook, which trains in one process."""
    source = _sampled(trl_script.unified(source))
    if (dtype := source.settings.get("dtype")) is not None and (dtype.value is None or trl_script.unknown(dtype)):
        source = replace(source, settings={**source.settings, "dtype": replace(dtype, value="bfloat16")})
    values = {**OVER, **{key: setting.value for key, setting in source.settings.items()}}
    release = choose(source, version)
    over = {**OVER, "use_vllm": bool(values.get("fast_inference"))}
    if any(key.startswith("finetune_") for key in values):
        over["lora_target_modules"] = "all-linear"
    micro = _micro_batch(values, release[0])
    to = translated(source, release, world_size, over=over, handlers=HANDLERS, micro=micro, ranks=1)
    if str(values["loss_type"]).lower() == "dapo":
        forced = {"grpo.epsilon_high": 0.28, "grpo.mask_truncated_completions": True}
        to.changes("loss_type", {"grpo.loss_type": "dapo", **forced}, "Unsloth forces both with dapo")
    if values["loss_type"] == "dr_grpo" and values.get("scale_rewards", release[0] < (0, 22)) is True:
        to.set("grpo.scale_rewards", "none", "Unsloth forces it with dr_grpo")
    return to


def _micro_batch(values: Mapping[str, Any], release: Version) -> tuple[int, str] | None:
    """G completions per device where the batch is no whole number of groups."""
    group, micro, accumulation = (values[key] for key in BATCH)
    is_known = all(isinstance(count, int) for count in (group, micro, accumulation))
    if not is_known or values.keys() & {"steps_per_generation", "generation_batch_size"}:
        return None
    if (micro if release < (0, 18) else micro * accumulation) % group == 0:
        return None
    return group, f"{micro} per device is no whole number of groups: Unsloth makes it {group}"


def _sampled(source: Source) -> Source:
    """The source with the arguments of the `SamplingParams` that `vllm_sampling_params` names, over plain keys."""
    named = source.settings.get("vllm_sampling_params")
    calls: dict[str, dict[str, Setting]] = {}
    settings: dict[str, Setting] = {}
    for key, setting in source.settings.items():
        if key.startswith("SamplingParams"):
            calls.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = setting
        else:
            settings[key] = setting
    if named is None:
        return replace(source, settings=settings)

    def place(setting: Setting) -> tuple[str, int]:
        return setting.file or "", setting.line or 0

    before = [call for call in calls.values() if all(place(one) <= place(named) for one in call.values())]
    chosen = before[-1] if before else {}
    is_read = getattr(source.settings.get("fast_inference"), "value", False) is True
    kept = {name: setting for name, setting in chosen.items() if name in SAMPLING and is_read}
    rest = {f"SamplingParams.{name}": setting for name, setting in chosen.items() if name not in kept}
    return replace(source, settings={**settings, **kept, **rest})


def _stop(to: Translation, key: str) -> None:
    setting = to.source.settings[key]
    if setting.value and setting.text is None and to.value("use_vllm"):
        return to.converted(key, {"grpo.generation_kwargs": {"stop": setting.value}}, "passed to the engine")
    return to.changes(key, {}, "the model's own end of a turn ends a completion")


def _completion(to: Translation, key: str) -> None:
    """The limit of a completion, often what a measured longest prompt leaves of `max_seq_length`."""
    whole = to.value("max_seq_length")
    if isinstance(to.value(key), str) and isinstance(whole, int):
        return to.changes(key, {"grpo.max_completion_length": whole}, REST)
    return to.same(key, "grpo.max_completion_length")


def _layers(to: Translation, key: str) -> None:
    named = "name the layers in peft.target_modules"
    to.inert(key, "all of them, as by default") if to.value(key) is True else to.changes(key, {}, named)


REST = "max_seq_length, from which the script takes the longest prompt that it meets"
SHARED = "Unsloth shares the engine's weights with training; here both hold them: lower it where memory ends"
HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(MEMORY, speed("Unsloth's own memory and speed")), **dict.fromkeys(LAYERS, _layers),
    "finetune_vision_layers": lambda to, key: to.same(key, "model.freeze_vision_tower", not to.value(key)),
    "fast_inference": lambda to, key: to.converted(key, {"grpo.use_vllm": bool(to.value(key))}, "vLLM in the process"),
    "vllm_gpu_memory_utilization": inert("from_pretrained says it"),
    "gpu_memory_utilization": lambda to, key: to.changes(key, {"vllm.gpu_memory_utilization": to.value(key)}, SHARED),
    "max_completion_length": _completion,
    "use_gradient_checkpointing": lambda to, key: to.speed(
        key, "Unsloth's kind moves activations to the host", {"grpo.gradient_checkpointing": bool(to.value(key))}
    ),
    "load_in_8bit": off("there is no 8-bit base here"), "load_in_16bit": inert("as here"),
    "load_in_fp8": off("there is no fp8 base here: weights stay in bfloat16"), "loftq_config": off("no LoftQ here"),
    "full_finetuning": inert("the peft section"), "vllm_sampling_params": inert("its arguments have rows"),
    "SamplingParams.stop": _stop, "SamplingParams.seed": inert("each engine draws from a stream of its own"),
    "SamplingParams.include_stop_str_in_output": inert("the end stays in a completion"),
    "SamplingParams.max_tokens": inert("max_completion_length decides"),
}  # fmt: skip
