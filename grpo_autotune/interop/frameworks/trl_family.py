"""open-r1, R1-V, VLM-R1 and Unsloth: TRL with defaults, rewards, data and trainers of their own.

open-r1 is TRL 0.18 with rewards by name, mixtures and a prompt column. R1-V (saccharomycetes/R1-V, zihui-debug/R1-V)
has a trainer on TRL 0.14, whose batch sizes count prompts. VLM-R1's, with the batch sizes of TRL 0.17, samples at
temperature 1 with `top_k` 50 whatever the command says, sums rewards without weights, cuts no prompt, chooses the
adapter's layers itself, and has a loss that is always GRPO's, mean by sequence. All are read in `src/open_r1/`.
Unsloth's scripts and notebooks train in one process, with defaults and batch sizes of `unsloth/models/rl.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.named import NAMED
from grpo_autotune.interop.frameworks import trl_script
from grpo_autotune.interop.frameworks.trl import translated, weighted
from grpo_autotune.interop.frameworks.trl_keys import SHELL, Handler, Version, choose, inert, listed, off, speed
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

OPEN_R1_REWARDS = {  # settings of its reward functions, with their defaults
    "cosine_min_value_wrong": 0.0, "cosine_max_value_wrong": -0.5, "cosine_min_value_correct": 0.5,
    "cosine_max_value_correct": 1.0, "cosine_max_len": 1000, "repetition_n_grams": 3, "repetition_max_penalty": -1.0,
    "code_language": "python", "code_eval_test_batch_size": 1, "code_eval_scoring_mode": "weighted_sum",
    "parallel_code_exec_per_proc": 2, "code_provider": "e2b", "ioi_provider": "piston", "e2b_router_url": None,
    "morph_router_url": None, "max_completion_len": 16384, "soft_punish_cache": 4096, "enforce_same_language": False,
}  # fmt: skip
OPEN_R1_NAMES = (
    "accuracy", "format", "reasoning_steps", "cosine", "repetition_penalty", "length", "code", "binary_code",
    "ioi_code", "cf_code", "code_format", "tag_count", "soft_overlong_punishment",
)  # fmt: skip
OPEN_R1_TEXT = '''"""Reward functions of open-r1, as its recipe has them."""

from types import SimpleNamespace

from open_r1.rewards import get_reward_funcs

{names} = get_reward_funcs(
    SimpleNamespace(
{arguments}    )
)
'''
PUBLISHED = ("benchmarks", "callbacks", "hub_model_revision", "overwrite_hub_revision", "wandb_run_group")
OPEN_R1_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(PUBLISHED, off("what open-r1 does after a checkpoint: publish, evaluate, log")),
    **dict.fromkeys(OPEN_R1_REWARDS, inert("a setting of its rewards")),
}


def _open_r1(source: Source, version: str | None, world_size: int | None) -> Translation:
    return translated(
        source, choose(source, version, "0.18.0"), world_size, over={"dataset_prompt_column": "prompt"},
        rewards=_of_open_r1, handlers=OPEN_R1_HANDLERS,
    )  # fmt: skip


def _of_open_r1(to: Translation) -> tuple[list[dict[str, Any]], str]:
    """Its functions as they are known here; the others by open-r1's own `get_reward_funcs`, in a module beside it."""
    names = [str(name) for name in listed(to.value("reward_funcs"))] or ["accuracy", "format", "tag_count"]
    wrong = next((name for name in names if name not in OPEN_R1_NAMES), None)
    if wrong:
        fix = f"Known: {', '.join(OPEN_R1_NAMES)}."
        raise ConfigError(f"open-r1 has no reward {wrong}", where=to.where("reward_funcs"), fix=fix)
    settings = {key: to.value(key, default) for key, default in OPEN_R1_REWARDS.items()}
    known = {name: NAMED["open-r1", name] for name in names if ("open-r1", name) in NAMED}
    items = {name: reward.item(settings) for name, reward in known.items() if reward.name}
    others = [name for name in names if name not in items]
    if others:
        given = {"reward_funcs": others, **settings}
        arguments = "".join(f"        {key}={value!r},\n" for key, value in given.items())
        left = ", ".join(others) + "," * (len(others) == 1)
        to.files["open_r1_rewards.py"] = OPEN_R1_TEXT.format(names=left, arguments=arguments)
        to.warnings.append(f"{', '.join(others)}: open-r1's own, by open_r1_rewards.py: have open-r1 installed")
    notes = [f"{name}: {reward.note}" for name, reward in known.items() if reward.name and reward.note]
    return weighted(to, [items.get(name) or {"name": f"open_r1_rewards:{name}"} for name in names]), "; ".join(notes)


R1_V_TEMPLATE = (
    "{problem}  Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
)
LIMITS = {"max_pixels": 12845056, "min_pixels": 3136}  # limits of an image by default, in VLM-R1 too
R1_V_UNREAD = dict.fromkeys(("top_p", "top_k", "reward_weights", "torch_dtype"), "R1-V's trainer never reads it")
WHOLE_PROMPTS = "R1-V samples from whole prompts, and miscounts longer ones in training; here no prompt is cut"


def _r1_v(source: Source, version: str | None, world_size: int | None) -> Translation:
    engine = "use_vllm" in source.settings and source.settings["use_vllm"].value is True
    fixed = {"top_k": 0} if engine else {"top_k": 50, "temperature": 1.0}
    to = translated(
        source, ((0, 14), "TRL 0.14.0", "the version that R1-V pins"), world_size,
        over={**LIMITS, **fixed},
        unread=R1_V_UNREAD if engine else {**R1_V_UNREAD, "temperature": "R1-V's trainer samples at 1 without vLLM"},
        rewards=_of_r1_v, handlers={"max_prompt_length": lambda to, key: to.changes(key, {}, WHOLE_PROMPTS)},
    )  # fmt: skip
    to.set("data.prompt_template", R1_V_TEMPLATE, "of the column `problem`; forks have others")
    return to


def _of_r1_v(to: Translation) -> tuple[list[dict[str, Any]], str]:
    names = listed(to.value("reward_funcs")) or ["accuracy", "format"]
    module = _module(to, "grpo")
    to.warnings.append(f"the rewards are R1-V's own, {module}: have its src folder on PYTHONPATH")
    return weighted(to, [{"name": f"{module}:{name}_reward"} for name in names]), ""


def _module(to: Translation, usual: str) -> str:
    """The program that a command starts, as a module."""
    name = re.sub(r".*[/.](?=[^/.])", "", (to.source.program or usual).removesuffix(".py"))
    return f"open_r1.{name if name.isidentifier() else usual}"


VLM_R1_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_prompt_length", "reward_weights",
         "use_vllm", "vllm_device", "vllm_gpu_memory_utilization", "vllm_max_model_len",
         "torch_dtype", "dataset_name", "sync_ref_model", "loss_type", "scale_rewards")  # fmt: skip
VLM_R1_UNREAD = dict.fromkeys(VLM_R1_NAMES, "VLM-R1's trainer takes it and never reads it")
VLM_R1_OVER = {
    **LIMITS, "temperature": 1.0, "top_k": 50, "loss_type": "grpo", "max_prompt_length": None, "dtype": "bfloat16",
    "beta": 0.04, "use_vllm": False, "freeze_vision_modules": False, "lora_target_modules": "all-linear",
}  # fmt: skip
ASKING = (
    " First output the thinking process in <think> </think> tags and then output the final answer in <answer> "
    "</answer> tags."
)
THINKING = (
    "First thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> {}answer here </answer>"
)
TEMPLATES = {  # of the Qwen models, by task
    "rec": f"{{problem}}{ASKING} Output the final answer in JSON format.",
    "ic": f"{{problem}} {THINKING.format('json format ')}", "odLength": f"{THINKING.format('')}\n{{problem}}",
}  # fmt: skip
MODULES = {"qwen": "Qwen2VLModule", "internvl": "InvernVLModule", "glm": "GLMVModule"}
TURNS = {"problem": "conversations.0.value", "solution": "conversations.1.value"}
REC = "open_r1.grpo_rec"  # its program of one task
IOU = "accuracy takes image_grid_thw and image_path, which only VLM-R1's trainer gives: write that one anew"
IN_REWARDS = "in the rewards' module"
VLM_R1_TEXT = '''"""Reward functions of VLM-R1, called as its trainer calls them; needs its src folder on PYTHONPATH."""

from {origin}

METHOD = {method!r}


def wrapped(solution):
    texts = [str(one).replace("<answer>", "").replace("</answer>", "").strip() for one in solution]
    return [f"<answer> {{text}} </answer>" for text in texts]
'''
FUNCTION = """

def {name}(completions, solution, **columns):
    methods = {{"accu_reward_method": [METHOD] * len(solution), **columns}}
    return {made}(completions=completions, solution=wrapped(solution), **methods)
"""


def _template(to: Translation, task: str) -> str:
    is_qwen = _vlm(to) == MODULES["qwen"]
    return TEMPLATES.get(task, f"{{problem}}{ASKING}") if is_qwen else f"{{problem}}{ASKING}"


def _vlm(to: Translation) -> str:
    model = str(to.value("model_name_or_path")).lower()
    return next((module for word, module in MODULES.items() if word in model), MODULES["qwen"])


def _vlm_files(to: Translation, key: str) -> None:
    """Files and image folders, each a list with colons: one data set, or a mixture that has each row once."""
    given = to.value("image_folders")
    paths = str(to.value("data_file_paths")).split(":")
    folders = given.split(":") if isinstance(given, str) else [""]  # a flag without its value is true
    if len(folders) != len(paths):
        what = f"{len(paths)} data files and {len(folders)} image folders"
        raise ConfigError(what, where=to.where(key), fix="Give one folder for each file.")
    template = _template(to, str(to.value("task_type")))
    parts: list[dict[str, Any]] = [
        {"path": path, "columns": TURNS, "prompt_template": template, **({"image_root": folder} if folder else {})}
        for path, folder in zip(paths, folders, strict=True)
    ]
    names = [f"{PurePosixPath(part['path']).stem}_{place}" for place, part in enumerate(parts, 1)]
    targets, note = {"path": "mixture", "mix": dict(zip(names, parts, strict=True))}, "joined, each row once"
    if len(parts) == 1:
        targets, note = parts[0], "the turns as columns"
    is_open = "$" in f"{paths}{folders}"
    targets = {f"data.{name}": value for name, value in targets.items()}
    to.verdict("changes" if is_open else "converted", key, targets, SHELL if is_open else note)


def _vlm_frozen(to: Translation, key: str) -> None:
    if to.value("use_peft"):
        return to.same(key, "model.freeze_vision_tower", True, "an adapter leaves the vision modules alone")
    return to.same(key, "model.freeze_vision_tower")


def _vlm_list(to: Translation, key: str) -> None:
    value = str(to.value(key))
    files = "a list of files and samplings: name them in data.mix" if value.endswith((".yaml", ".yml")) else ""
    to.verdict("changes" if files else "same", key, {"data.path": value}, files)


LAYERS = "VLM-R1 adapts each linear layer outside the vision modules, whatever is named; here without lm_head"
VLM_R1_HANDLERS: dict[str, Handler] = {
    "data_file_paths": _vlm_files, "image_folders": inert("with data_file_paths"), "task_type": inert(IN_REWARDS),
    "is_reward_customized_from_vlm_module": inert(IN_REWARDS), "reward_method": inert(IN_REWARDS),
    "dataset_name": _vlm_list, "image_root": lambda to, key: to.same(key, "data.image_root"),
    "val_split_ratio": lambda to, key: to.same(key, "data.split_ratio", to.value(key) or None),
    "freeze_vision_modules": _vlm_frozen,
    "lora_target_modules": lambda to, key: to.changes(key, {"peft.target_modules": "all-linear"}, LAYERS),
    "max_anyres_num": off("tiles of InternVL: the model's own number holds"),
    "arrow_cache_dir": speed("a folder of caches"),
}  # fmt: skip


def _vlm_r1(source: Source, version: str | None, world_size: int | None) -> Translation:
    from_files = "data_file_paths" in source.settings
    unread = {key: why for key, why in VLM_R1_UNREAD.items() if from_files or key != "dataset_name"}
    release = choose(source, version, "0.17.0")
    to = translated(
        source, release, world_size, over=VLM_R1_OVER, unread=unread, rewards=_of_vlm_r1, handlers=VLM_R1_HANDLERS
    )
    if _module(to, "") == REC:
        to.set("data.prompt_template", _template(to, "rec"), "of the column `problem`")
    return to


def _of_vlm_r1(to: Translation) -> tuple[list[dict[str, Any]], str]:
    names = [str(name) for name in listed(to.value("reward_funcs"))] or ["accuracy", "format"]
    vlm, note = _vlm(to), ""
    origin, made = f"{_module(to, 'grpo_jsonl')} import reward_funcs_registry", "reward_funcs_registry[{!r}]"
    is_rec = _module(to, "") == REC
    if is_rec or to.value("is_reward_customized_from_vlm_module"):
        origin = f"open_r1.vlm_modules import {vlm}"
        made = f"{vlm}.select_reward_func({{!r}}, {'rec' if is_rec else to.value('task_type')!r})"
        note = IOU if "accuracy" in names and vlm == MODULES["qwen"] else ""
    method = str(to.value("reward_method") or "default").partition(":")[0]
    functions = [FUNCTION.format(name=name, made=made.format(name)) for name in names]
    to.files["vlm_r1_rewards.py"] = VLM_R1_TEXT.format(origin=origin, method=method) + "".join(functions)
    to.warnings.append("the rewards are VLM-R1's own, by vlm_r1_rewards.py: have its src folder on PYTHONPATH")
    return weighted(to, [{"name": f"vlm_r1_rewards:{name}"} for name in names]), note


UNSLOTH_OVER = {  # defaults over those of TRL
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
UNSLOTH_LAYERS = ("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules")
BATCH = ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
SAMPLING = ("min_p", "top_p", "top_k", "temperature", "repetition_penalty")


def _unsloth(source: Source, version: str | None, world_size: int | None) -> Translation:
    source = _sampled(trl_script.unified(source))
    if (dtype := source.settings.get("dtype")) is not None and (dtype.value is None or trl_script.unknown(dtype)):
        source = replace(source, settings={**source.settings, "dtype": replace(dtype, value="bfloat16")})
    values = {**UNSLOTH_OVER, **{key: setting.value for key, setting in source.settings.items()}}
    release = choose(source, version)
    over = {**UNSLOTH_OVER, "use_vllm": bool(values.get("fast_inference"))}
    if any(key.startswith("finetune_") for key in values):
        over["lora_target_modules"] = "all-linear"
    micro = _micro_batch(values, release[0])
    to = translated(source, release, world_size, over=over, handlers=UNSLOTH_HANDLERS, micro=micro, ranks=1)
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
UNSLOTH_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(MEMORY, speed("Unsloth's own memory and speed")), **dict.fromkeys(UNSLOTH_LAYERS, _layers),
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


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of a recipe, a command or a script of one of them."""
    of_framework = {"open-r1": _open_r1, "r1-v": _r1_v, "vlm-r1": _vlm_r1, "unsloth": _unsloth}[source.framework]
    return of_framework(source, version, world_size)
