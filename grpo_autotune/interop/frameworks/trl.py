"""TRL's own configurations: `TrlParser` YAML, command lines (`trl grpo`, `accelerate launch grpo.py`) and scripts.

What a release defaulted to is written out where TRL 1.16 differs. open-r1, VLM-R1, R1-V and Unsloth are TRL with other
defaults, rewards and data: their modules say what differs, and come here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import sharding, trl_script
from grpo_autotune.interop.frameworks.trl_keys import (
    DEFAULTS,
    HANDLERS,
    NEWEST,
    RUNS,
    SHELL,
    Handler,
    Version,
    choose,
    defaults,
    listed,
    plain,
    settle,
    speed,
)
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import SixNumbers, Translation

Rewards = Callable[[Translation], tuple[list[dict[str, Any]], str]]  # items of `rewards`, and what differs

MODEL = {"use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_task_type": "CAUSAL_LM"}
"""Defaults of `ModelConfig`, which a command line has, in all releases; a script has PEFT's."""
MADE = [r"(.*\.)?(LoraConfig|get_peft_model)\b", r"ModelConfig\b"]  # calls of a script that say how it adapts
PEFT = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
NO_DEFAULT = object()
BATCH = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "steps_per_generation",
    "generation_batch_size", "num_iterations",
)  # fmt: skip
REWARDS: dict[str, dict[str, Any]] = {  # names of `trl grpo --reward_funcs` -> items of `rewards` (trl/scripts/grpo.py)
    **{name: {"name": name} for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")},
    "get_soft_overlong_punishment": {
        "name": "soft_overlong_punishment", "params": {"max_completion_len": 1280, "soft_punish_cache": 256},
    },
}  # fmt: skip


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of a TRL configuration; ConfigError in one line where there is none."""
    unread = trl_script.unread(source)
    return translated(trl_script.with_program(source), choose(source, version), world_size, unread=unread)


def translated(
    source: Source, release: tuple[Version, str, str], world_size: int | None, *,
    over: Mapping[str, Any] | None = None, unread: Mapping[str, str] | None = None, rewards: Rewards | None = None,
    handlers: Mapping[str, Handler] | None = None, micro: tuple[int, str] | None = None, ranks: int | None = None,
) -> Translation:  # fmt: skip
    """A configuration of TRL or of a framework on it: its defaults `over` TRL's, keys that its trainer takes and never
    reads and why (`unread`), its `rewards`, what its own keys become (`handlers`), completions per device where it
    changes their number and how (`micro`), and training processes where the launcher does not tell (`ranks`)."""
    number, name, why = release
    said, over, unread = sharding.with_launch(trl_script.unified(source)), over or {}, unread or {}
    files = {key: str(said.settings[key].value) for key in ("deepspeed", "accelerate_config") if key in said.settings}
    named = next((key for key, file in files.items() if re.search(r"zero|^deepspeed .*\.json$", f"{key} {file}")), None)
    if named is not None:
        said = sharding.with_file(said, said.settings[named], sharding.PREFIX)
        if isinstance(_zero(files[named]), dict) and not any(key.startswith(sharding.PREFIX) for key in said.settings):
            guess = f"{files[named]} is not at hand: plain ZeRO of the stage in its name is taken for it"
            said = replace(said, warnings=(*said.warnings, guess))
    read = replace(said, settings={key: plain(key, one) for key, one in said.settings.items() if key not in unread})
    is_script = trl_script.is_script(source)
    makes = [pattern for pattern in MADE if any(re.match(pattern, key) for key in source.settings)]
    is_peft = is_script and "use_peft" not in read.settings and makes != MADE[1:]  # a script without `ModelConfig`
    adapts = any(key.startswith("lora_") or key == "adapter" for key in read.settings)
    model = {**PEFT, "use_peft": adapts} if is_peft else MODEL
    weights = "auto" if is_script and number == (0, 26) else "float32"
    to = Translation(read, {**model, "dtype": weights, **defaults(number), **over}, name, why, world_size)
    _batch(to, number, micro, ranks)
    items, differs = (rewards or _rewards)(to)
    (to.changes if differs else to.converted)("reward_funcs", {"rewards": items}, differs or "functions by name")
    newest = defaults(NEWEST)
    older = {key: handler for key, (since, handler) in OF_RELEASE.items() if number < since}
    table = {**HANDLERS, "dataset_name": _data, **older, **(handlers or {})}
    for key in [*read.settings, *DEFAULTS, *over, *(() if is_peft else model), "dtype"]:
        is_silent = key in ("use_peft", "use_vllm") or to.value(key) in (None, newest.get(key, NO_DEFAULT))
        if key in to.rows or (key not in read.settings and is_silent):
            continue
        if key != named and not key.startswith((sharding.LAUNCH, "deepspeed.")):
            settle(to, key, table)
    _whole(to)
    sharding.apply_launch(to, adapter=bool(to.value("use_peft")))
    if named is not None:
        sharding.apply_deepspeed(to, named, _zero(files[named]), adapter=bool(to.value("use_peft")))
    to.source = said
    for key in said.settings.keys() & unread.keys():
        to.inert(key, unread[key])
    return to


def _token_loss(to: Translation, key: str) -> None:
    """TRL before 1.9 divides the token losses by the tokens of a whole rollout, later ones by those of a step."""
    factor = to.values["grpo.steps_per_generation"] / to.values["grpo.gradient_accumulation_steps"]
    differs = to.value(key) in ("dapo", "cispo") and factor != 1
    note = f"gradients are {factor:g} times as large here, which clipping (max_grad_norm) feels and Adam does not"
    to.verdict("changes" if differs else "same", key, {"grpo.loss_type": to.value(key)}, note if differs else "")


def _adapter(to: Translation, key: str) -> None:
    targets = {"model.adapter": to.value(key), "model.adapter_reference": "base"}
    to.converted(key, targets, "the reference is the model without it")


KERNELS = "kernels of the model's layers; TRL 1.16 means its fused loss by this key, which is left off"
OF_RELEASE: dict[str, tuple[Version, Handler]] = {  # key -> the release of today's meaning, and what to do before that
    "use_liger_kernel": ((0, 28), speed(KERNELS)),
    "top_k": ((0, 16), lambda to, key: to.same(key, "grpo.top_k", 0 if to.value("use_vllm") else to.value(key))),
    "loss_type": ((1, 9), _token_loss),
    "adapter": ((0, 27), _adapter),
}


def _whole(to: Translation) -> None:
    is_open = not to.values.keys() & {"data.eval_split", "data.split_ratio"}
    if is_open and to.values.get("grpo.eval_strategy", "no") != "no":
        if trl_script.is_script(to.source):
            note = "the script's own code makes the held-out rows: off until data.eval_split or eval_path names some"
            to.changes("eval_strategy", {"grpo.eval_strategy": "no"}, note)
            if to.value("load_best_model_at_end"):
                to.changes("load_best_model_at_end", {"grpo.load_best_model_at_end": False}, "off with the evaluation")
        else:
            to.set("data.eval_split", "test", "TRL's default")
    needed = {"data.path": ("data set", "dataset_name"), "model.name_or_path": ("model", "model_name_or_path")}
    for kind, key in (names for path, names in needed.items() if not to.values.get(path)):
        fix = f"Name one ({key}); save what a program builds first."
        raise ConfigError(f"no {kind} is named that can be loaded", where=to.source.path.name, fix=fix)


def _zero(path: str) -> str | dict[str, Any]:
    """DeepSpeed's plain configuration for a file that is not at hand, where its name tells the stage of ZeRO."""
    name = re.search(r"zero_?([123])[^/]*$", path)
    offload = "cpu" if "offload" in path.rpartition("/")[2] else "none"
    return path if name is None or Path(path).is_file() else sharding.zero(int(name[1]), optimizer=offload)


CODE = "the script's own code makes the prompts (map, filter): it is not run, so write data.columns or a template"


def _data(to: Translation, key: str) -> None:
    if trl_script.unknown(to.source.settings[key]):
        return to.dropped(key, RUNS)
    note = CODE if _is_code(to, key) or _is_code(to, "reward_funcs") else SHELL if "$" in str(to.value(key)) else ""
    comment = "rows as they are published" * (note == CODE)
    return to.verdict("changes" if note else "same", key, {"data.path": to.value(key)}, note, comment)


def _is_code(to: Translation, key: str) -> bool:
    setting = to.source.settings.get(key)
    return trl_script.is_script(to.source) or (setting is not None and (setting.file or "").endswith(".py"))


def _batch(to: Translation, version: Version, changed: tuple[int, str] | None, usual: int | None) -> None:
    """The six numbers: TRL 0.14 counts prompts per device, 0.15 to 0.17 generate in each micro step."""
    ranks = sharding.processes(to) or to.number("num_processes") or usual or to.world_size
    if ranks is None:
        to.warnings.append("the file does not say how many processes train: 1 is assumed (--world-size)")
    ranks = ranks or 1
    micro, accumulation, group = (to.number(key) for key in BATCH[:3])
    notes = []
    if version < (0, 15):
        notes.append(f"per_device_train_batch_size counts prompts: {micro} x {group} completions")
        micro *= group
    if changed:
        micro, note = changed
        notes.append(note)
    rollout = to.number("generation_batch_size") or micro * ranks * (to.number("steps_per_generation") or accumulation)
    if version < (0, 18):
        rollout = micro * ranks
        notes.append("completions are generated in each micro step")
    if rollout % group:
        what = f"a rollout of {rollout} completions is no whole number of groups of {group}"
        raise ConfigError(what, where=to.where("num_generations"), fix="Say how many processes train: --world-size.")
    completions, passes = micro * ranks * accumulation, to.number("num_iterations")
    batch = SixNumbers(group, rollout // group, completions, passes, ranks, micro)
    to.set_batch(batch, [key for key in BATCH if to.given(key) or key in BATCH[:3]], "; ".join(notes))


def _rewards(to: Translation) -> tuple[list[dict[str, Any]], str]:
    names = [str(name) for name in listed(to.value("reward_funcs"))]
    if _is_code(to, "reward_funcs"):
        return weighted(to, trl_script.rewards(to, names)), ""
    if wrong := next((name for name in names if name not in REWARDS and "." not in name), None):
        fix = f"Known: {', '.join(REWARDS)}, or module.function."
        raise ConfigError(f"TRL has no reward {wrong}", where=to.where("reward_funcs"), fix=fix)
    return weighted(to, [REWARDS.get(name, {"name": ":".join(name.rsplit(".", 1))}) for name in names]), ""


def weighted(to: Translation, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same items with the weights of `reward_weights`. ConfigError where there are no items."""
    weights = listed(to.value("reward_weights"))
    if not items:
        named = to.value("reward_funcs")
        what = f"no reward function: only a run can tell what {named} is" if named else "no reward function"
        fix = "Name functions of a module (reward_funcs: [module.function]). A reward model is to be called by one."
        raise ConfigError(what, where=to.where("reward_funcs") if named else to.source.path.name, fix=fix)
    if weights and len(weights) != len(items):
        what = f"{len(weights)} weights for {len(items)} rewards"
        raise ConfigError(what, where=to.where("reward_weights"), fix="Give one weight for each reward.")
    return [{**item, "weight": float(weight)} for item, weight in zip(items, weights, strict=False)] or items
