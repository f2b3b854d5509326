"""VLM-R1: a trainer of its own, with the batch sizes of TRL 0.17 and a loss that is always GRPO's, mean by sequence.

Source: `src/open-r1-multimodal/src/open_r1/{grpo_jsonl.py,grpo_rec.py,trainer/,vlm_modules/}`. Its trainer samples at
temperature 1 with transformers' own `top_k` of 50 whatever the command says, sums rewards without weights, cuts no
prompt, and chooses the adapter's layers itself.
"""

from pathlib import PurePosixPath
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks.r1_v import LIMITS
from grpo_autotune.interop.frameworks.trl import translated, weighted
from grpo_autotune.interop.frameworks.trl_keys import SHELL, Handler, inert, listed, off, speed
from grpo_autotune.interop.frameworks.trl_versions import choose
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_prompt_length", "reward_weights",
         "use_vllm", "vllm_device", "vllm_gpu_memory_utilization", "vllm_max_model_len",
         "torch_dtype", "dataset_name", "sync_ref_model", "loss_type", "scale_rewards")  # fmt: skip
UNREAD = dict.fromkeys(NAMES, "VLM-R1's trainer takes it and never reads it")
OVER = {
    **LIMITS, "temperature": 1.0, "top_k": 50, "loss_type": "grpo", "max_prompt_length": None, "dtype": "bfloat16",
    "beta": 0.04, "use_vllm": False, "freeze_vision_modules": False, "lora_target_modules": "all-linear",
}  # fmt: skip
ASKING = (
    " First output the thinking process in <think> </think> tags and then output the final answer in <answer> "
    "</answer> tags."
)
TEMPLATES = {"rec": f"{{problem}}{ASKING} Output the final answer in JSON format."}
"""Kind of task -> the prompt of the Qwen models (`vlm_modules/qwen_module.py`)."""
MODULES = {"qwen": "Qwen2VLModule", "internvl": "InvernVLModule", "glm": "GLMVModule"}
TURNS = {"problem": "conversations.0.value", "solution": "conversations.1.value"}
MODULE = "vlm_r1_rewards"
IN_REWARDS = "in the rewards' module"
MODULE_TEXT = '''"""Reward functions of VLM-R1, called as its trainer calls them; needs its src folder on PYTHONPATH."""

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


def _files(to: Translation, key: str) -> None:
    """Files and image folders, each a list with colons: one data set, or a mixture that has each row once."""
    given = to.value("image_folders")
    paths = str(to.value("data_file_paths")).split(":")
    folders = given.split(":") if isinstance(given, str) else [""]  # a flag without its value is true
    if len(folders) != len(paths):
        what = f"{len(paths)} data files and {len(folders)} image folders"
        raise ConfigError(what, where=to.where(key), fix="Give one folder for each file.")
    template = TEMPLATES.get(str(to.value("task_type")), f"{{problem}}{ASKING}")
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


def _frozen(to: Translation, key: str) -> None:
    """An adapter is never on the vision modules, so that nothing of them trains."""
    adapter = bool(to.value("use_peft"))
    note = "an adapter leaves the vision modules alone" if adapter else ""
    to.same(key, "model.freeze_vision_tower", True if adapter else None, note)


def _layers(to: Translation, key: str) -> None:
    note = "VLM-R1 adapts each linear layer outside the vision modules, whatever is named; here without lm_head"
    to.changes(key, {"peft.target_modules": "all-linear"}, note)


HANDLERS: dict[str, Handler] = {
    "data_file_paths": _files, "image_folders": inert("with data_file_paths"), "task_type": inert(IN_REWARDS),
    "is_reward_customized_from_vlm_module": inert(IN_REWARDS), "reward_method": inert(IN_REWARDS),
    "val_split_ratio": lambda to, key: to.same(key, "data.split_ratio", to.value(key) or None),
    "freeze_vision_modules": _frozen, "lora_target_modules": _layers,
    "max_anyres_num": off("tiles of InternVL: the model's own number holds"),
    "arrow_cache_dir": speed("a folder of caches"),
}  # fmt: skip


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of a VLM-R1 command."""
    from_files = "data_file_paths" in source.settings
    unread = {key: why for key, why in UNREAD.items() if from_files or key != "dataset_name"}
    release = choose(source, version, "0.17.0")
    return translated(source, release, world_size, over=OVER, unread=unread, rewards=_rewards, handlers=HANDLERS)


def _rewards(to: Translation) -> tuple[list[dict[str, Any]], str]:
    """VLM-R1's own functions, in a module beside the configuration that gives them the columns they read."""
    names = [str(name) for name in listed(to.value("reward_funcs"))] or ["accuracy", "format"]
    to.files[f"{MODULE}.py"] = _module(to, names)
    to.warnings.append(f"the rewards are VLM-R1's own, by {MODULE}.py: have its src folder on PYTHONPATH")
    return weighted(to, [{"name": f"{MODULE}:{name}"} for name in names]), ""


def _module(to: Translation, names: list[str]) -> str:
    model = str(to.value("model_name_or_path")).lower()
    vlm = next((module for word, module in MODULES.items() if word in model), "Qwen2VLModule")
    origin, made = "open_r1.grpo_jsonl import reward_funcs_registry", "reward_funcs_registry[{!r}]"
    if to.value("is_reward_customized_from_vlm_module"):
        origin = f"open_r1.vlm_modules import {vlm}"
        made = f"{vlm}.select_reward_func({{!r}}, {to.value('task_type')!r})"
    method = str(to.value("reward_method") or "default").partition(":")[0]
    functions = [FUNCTION.format(name=name, made=made.format(name)) for name in names]
    return MODULE_TEXT.format(origin=origin, method=method) + "".join(functions)
