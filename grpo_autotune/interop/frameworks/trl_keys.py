"""The keys of TRL's GRPO from 0.14, the first release with it, to 1.16: their defaults, those that went, and verdicts.

Source: the dataclasses of the wheels of all these releases, with the defaults of transformers' `TrainingArguments`
where TRL set none at the time. A key that is older in spirit than in name is here with what the trainer did before:
GRPO's loss of 0.14 is `grpo`. Most keys keep their meaning under their own name; the tables say the rest.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.renamed_keys import MOVED, SAID
from grpo_autotune.config.sampling import RANGES, UNUSABLE
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks.trl_script import MANY_TURNS, unknown
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

Version = tuple[int, int]
FIRST, NEWEST = (0, 14), (1, 16)

LAST_WITH = {  # release -> the keys that it is the last to have
    "0.17": "vllm_device vllm_dtype vllm_max_model_len vllm_enable_prefix_caching",
    "0.26": "torch_dtype gradient_checkpointing_use_reentrant wandb_log_unique_prompts",
    "0.27": "max_prompt_length vllm_guided_decoding_regex use_liger_loss",
}

DEFAULTS: Mapping[str, Mapping[Version, Any]] = {  # key -> release -> its default from there on; others never changed
    "per_device_train_batch_size": {(0, 14): 1, (0, 15): 8},
    "gradient_accumulation_steps": {(0, 14): 8, (0, 15): 1},
    "max_prompt_length": {(0, 14): 512, (0, 26): None},
    "max_completion_length": {(0, 14): 256, (1, 10): 512},
    "temperature": {(0, 14): 0.9, (0, 18): 1.0},
    "top_k": {(0, 14): 50, (0, 18): 0},
    "beta": {(0, 14): 0.04, (0, 19): 0.0},
    "loss_type": {(0, 14): "grpo", (0, 16): "bnpo", (0, 22): "dapo"},
    "use_bias_correction_kl": {(0, 14): False, (1, 10): True},
    "ref_model_mixup_alpha": {(0, 14): 0.9, (0, 16): 0.6},
    "ref_model_sync_steps": {(0, 14): 64, (0, 16): 512},
    "vllm_mode": {(0, 14): "device", (0, 16): "server", (1, 0): "colocate"},
    "vllm_gpu_memory_utilization": {(0, 14): 0.9, (0, 18): 0.3},
    "vllm_server_timeout": {(0, 14): 120.0, (0, 17): 240.0},
    "vllm_importance_sampling_correction": {(0, 14): False, (0, 23): True},
    "vllm_importance_sampling_mode": {(0, 14): "token_truncate", (0, 26): "sequence_mask"},
    "vllm_importance_sampling_clip_max": {(0, 14): 2.0, (0, 26): 3.0},
    "gradient_checkpointing": {(0, 14): False, (0, 22): True},
    "bf16": {(0, 14): False, (0, 19): None},
    "logging_steps": {(0, 14): 500, (0, 19): 10},
}


def defaults(version: Version) -> dict[str, Any]:
    """Defaults of a release for every key of the installed `GRPOConfig`, and for those that are gone."""
    values = {name: key.default_value() for name, key in grpo_keys().items()}
    for name, history in DEFAULTS.items():
        values[name] = history[max(since for since in history if since <= version)]
    return values


def choose(source: Source, asked: str | None, pinned: str | None = None) -> tuple[Version, str, str]:
    """The release that a source was written for, its name, and why it is taken. ConfigError for one without GRPO."""
    hint = source.hints.get("trl")
    last, by = by_keys(source.settings)
    is_older = source.framework == "open-r1" and last in LAST_WITH  # its recipes are older than what it pins today
    name, why = (
        (asked, "--source-version") if asked
        else (hint, "the version that the file names") if hint
        else (pinned, f"the version that {source.framework} pins") if pinned and not (is_older and last < pinned)
        else (last, by)
    )  # fmt: skip
    parts = (name or "").lstrip("v").split(".")
    if not all(part.isdecimal() for part in parts[:2]):
        raise ConfigError(f"{name!r} is no version of TRL", where="--source-version", fix="Such as 0.17.0 or 1.16.0.")
    version = (int(parts[0]), int(parts[1]) if parts[1:] else 0)
    if version < FIRST:
        raise ConfigError(f"TRL {name} has no GRPO", where=source.path.name, fix="The first that has it is 0.14.")
    if version > NEWEST:
        why += f"; its defaults are taken to be those of {NEWEST[0]}.{NEWEST[1]}"
    return min(version, NEWEST), f"TRL {name}", why


def by_keys(keys: Collection[str]) -> tuple[str, str]:
    """The newest release that has all the keys, and the key that decides."""
    for release, names in LAST_WITH.items():
        if key := next((name for name in names.split() if name in keys), None):
            return release, f"assumed: the last release with the key {key} (--source-version)"
    return f"{NEWEST[0]}.{NEWEST[1]}", "assumed, as nothing in the file tells (--source-version)"


Handler = Callable[[Translation, str], None]
PLACES = {  # key -> the key path that means the same, beside `renamed_keys.MOVED` and the keys of `GRPOConfig`
    **{trl: f"vllm.{ours}" for ours, trl in VLLM_TO_TRL.items()},
    "model_name_or_path": "model.name_or_path", "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code", "load_in_4bit": "model.load_in_4bit",
    "chat_template": "model.chat_template", "system_prompt": "data.system_prompt",
    "lora_alpha": "peft.lora_alpha", "lora_dropout": "peft.lora_dropout", "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora", "lora_bias": "peft.bias", "max_pixels": "data.max_pixels",
    "min_pixels": "data.min_pixels", "max_seq_length": "vllm.max_model_len", "adapter": "model.adapter",
    "vllm_importance_sampling_cap": "grpo.vllm_importance_sampling_clip_max",
}  # fmt: skip
SPELLINGS: Mapping[str, Mapping[Any, Any]] = {  # key -> a value as text -> the same as it is written here
    "scale_rewards": {"True": "group", "False": "none"}, "top_k": {"None": 0, "-1": 0},
    "eval_strategy": {"False": "no"}, "evaluation_strategy": {"False": "no"},
}  # fmt: skip
NEEDS: tuple[tuple[str, str, Any, str], ...] = (  # keys, the key they need and its value, and what is said without it
    (r"(vllm_|SamplingParams\.).*|max_seq_length|gpu_memory_utilization", "use_vllm", True, "vLLM is off"),
    (r"vllm_(server_.*|group_port)", "vllm_mode", ("server",), "the engine is not a server's"),
    (r"vllm_(gpu_memory|tensor_parallel)\w+", "vllm_mode", ("colocate", "device"), "a server has its own"),
    (r"vllm_importance_sampling_(mode|cap|clip\w+)", "vllm_importance_sampling_correction", True, "no correction"),
    (r"lora_.*|use_(rslora|dora)", "use_peft", True, "without use_peft the whole model is trained"),
    (r"ref_model_.*", "sync_ref_model", True, "the reference is not synchronised"),
    (r"use_bias_correction_kl", "beta", True, "beta is 0"),
    (r"bnb_4bit_\w+|use_bnb_nested_quant", "load_in_4bit", True, "4 bits are off"),
    (r"dataset_test_split", "eval_strategy", ("steps", "epoch"), "evaluation is off"),
)
INERT = {
    "use_peft": "the peft section", "resume_from_checkpoint": "go on with the option --resume",
    "overwrite_output_dir": "give another folder with output.dir", "do_train": "always",
    "do_eval": "eval_strategy decides", "accelerate_config": "how processes are started",
    "num_processes": "the number of processes", "local_rank": "the launcher says it",
    "config": "its settings have rows", "is_trainable": "an adapter is trained",
    "vllm_device": "the engine's GPU: vllm_mode decides", "logging_nan_inf_filter": "a loss of NaN stops the run",
    "reward_weights": "weights of the rewards",
}  # fmt: skip
SPEED = {
    "ds3_gather_for_generation": "how ZeRO-3 gathers weights", "bnb_4bit_quant_storage": "how weights are stored",
    "gradient_checkpointing_use_reentrant": "the kind of checkpointing", "dataset_streaming": "data is loaded whole",
    "dataset_num_proc": "processes that prepare data",
}  # fmt: skip
MODEL_INIT = {  # arguments of `from_pretrained` -> key paths
    "dtype": "model.dtype", "torch_dtype": "model.dtype", "revision": "model.revision",
    "attn_implementation": "model.attn_implementation", "trust_remote_code": "model.trust_remote_code",
}  # fmt: skip
RUNS = "only a run of the program can tell its value: set it by hand"
SHELL = "the shell builds it: write what it gives"


SWITCHES = {**dict.fromkeys(("1", "yes", "y", "t"), True), **dict.fromkeys(("0", "no", "n", "f"), False)}
MEMBER = re.compile(r"(\w+\.)*(?P<kind>TaskType|\w+(Type|Strategy|Names))\.(?P<name>[A-Z_0-9]+)")


def plain(key: str, setting: Setting) -> Setting:
    """A setting with the other words for true and false of HfArgumentParser, and with a member of an enumeration, as
    the plain value."""
    value, known = setting.value, grpo_keys().get(key)
    is_switch = key in ("use_peft", "load_in_4bit", "load_in_8bit") or (known is not None and known.allows(True))
    if is_switch and str(value).lower() in SWITCHES and not (known is not None and known.allows(value)):
        return replace(setting, value=SWITCHES[str(value).lower()])
    if match := MEMBER.fullmatch(str(value)):
        return replace(setting, value=match["name"] if match["kind"] == "TaskType" else match["name"].lower())
    return setting


def settle(to: Translation, key: str, handlers: Mapping[str, Handler]) -> None:
    """The verdict of a key by its needs, a handler, or its kind; none if not known. ConfigError if TRL refuses it."""
    for pattern, needed, wanted, why in NEEDS:
        value = to.value(needed)
        if re.fullmatch(pattern, key) and not (value if wanted is True else value in wanted):
            return to.inert(key, why)
    if key in RANGES and key in _sampling(to):
        return to.inert(key, "generation_kwargs wins over it")
    if key.startswith(("hub_", "push_to_hub")) and key not in handlers:
        return to.dropped(key, "nothing is published: push the trained folder yourself")
    return handlers.get(key, _plain)(to, key)


def _plain(to: Translation, key: str) -> None:
    target = PLACES.get(key) or (f"grpo.{key}" if key in grpo_keys() else MOVED.get(key))
    known, setting, value = grpo_keys().get(key), to.source.settings.get(key), to.value(key)
    value = SPELLINGS.get(key, {}).get(str(value), value)
    if target is None:
        return to.dropped(key, SAID[key]) if key in SAID else None
    if setting is not None and unknown(setting):
        is_switch = key in ("bf16", "fp16") and re.search(r"is_(bf16|bfloat16)_supported", value)
        return to.inert(key, "bf16 where the GPU has it, as by default") if is_switch else to.dropped(key, RUNS)
    if value is None and setting is not None and not (known and known.allows(None)):
        return to.inert(key, "null: the default")
    if known is not None and not known.allows(value):
        fix = f"Accepted: {known.accepted()}."
        fix += " Give the variable behind it with --env NAME=VALUE." * ("$" in str(value))
        raise ConfigError(f"{value!r} is not accepted", where=to.where(key), fix=fix)
    if "$" in str(value) and target in ("model.name_or_path", "data.path"):
        return to.changes(key, {target: value}, SHELL)
    return to.same(key, target, value)


def listed(value: Any) -> list[Any]:
    """A value as a list: one item is often written without."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _dtype(to: Translation, key: str) -> None:
    value = str(to.value(key)).removeprefix("torch.")
    if key == "dtype" and (to.given("torch_dtype") or (not to.given(key) and "model.dtype" in to.values)):
        return
    if value == "None":
        to.converted(key, {"model.dtype": "float32"}, "null: transformers 4 loads the weights in 32 bits")
    else:
        note = "" if to.given(key) or value != "float32" else "without it TRL loads the weights in 32 bits"
        to.same(key, "model.dtype", value, note, comment=note)


def _model_init(to: Translation, key: str) -> None:
    given = to.value(key) if isinstance(to.value(key), dict) else {}
    kept = {MODEL_INIT[name]: value for name, value in given.items() if name in MODEL_INIT}
    kept |= {"model.dtype": str(kept["model.dtype"]).removeprefix("torch.")} if "model.dtype" in kept else {}
    lost = ", ".join(name for name in given if name not in MODEL_INIT)
    (to.changes if lost else to.converted)(key, kept, f"no place for {lost}" if lost else "the model section")


def _lora(to: Translation, key: str) -> None:
    """A list of LoRA's: TRL unwraps one of a single name, and a comma behind a name of a shell's list stays in it."""
    target = f"peft.{key.removeprefix('lora_')}"
    value = to.value(key)
    clean = [str(name).rstrip(",") for name in listed(value)]
    kept = [str(name) for name in listed(value) if not str(name).endswith(",")]
    if isinstance(value, list) and clean != kept:
        to.warnings.append(f"{to.where(key)}: the commas are part of the names; PEFT adapts {kept or 'nothing'} alone")
        to.changes(key, {target: clean}, f"without the commas; as written, {kept or 'nothing'} alone")
    else:
        to.same(key, target, "all-linear" if clean == ["all-linear"] else value)


def _mixture(to: Translation, key: str) -> None:
    """Data sets joined to one: a mixture without weights, each row once per epoch."""
    value = to.value(key)
    given = value if isinstance(value, dict) else {"datasets": value}
    parts = {}
    for place, one in enumerate(listed(given.get("datasets")), 1):
        share = one.get("fraction", one.get("weight"))
        part = {"path": one.get("path") or one.get("id"), "name": one.get("name") or one.get("config"),
                "split": one.get("split"), "subsample": share if share and share < 1 else None}  # fmt: skip
        parts[f"part{place}"] = {name: text for name, text in part.items() if text}
    whole = {"data.path": "mixture", "data.mix": parts}
    only = {f"data.{name}": text for name, text in parts.get("part1", {}).items()}
    held = {"data.split_ratio": given["test_split_size"]} if given.get("test_split_size") else {}
    to.converted(key, {**(only if len(parts) == 1 else whole), **held}, f"{len(parts)} data sets, joined")


def _warmup(to: Translation, key: str) -> None:
    if not to.number(key) or to.number("warmup_steps", 0):
        return to.inert(key, "warmup_steps wins over it" if to.number(key) else "no warm-up")
    return to.converted(key, {"grpo.warmup_steps": to.number(key)}, "below 1 it is a share of all steps")


def _prompt_limit(to: Translation, key: str) -> None:
    """Old releases keep a prompt's last tokens."""
    setting = to.source.settings.get(key)
    if setting is not None and unknown(setting):
        to.dropped(key, RUNS)
    elif (limit := to.number(key)) is None:
        to.inert(key, "no limit")
    elif to.given("resize") or re.search(r"(?i)vl\b|-vl|vision", str(to.value("model_name_or_path"))):
        note = "rows with longer prompts are left out; TRL cuts them, through an image too"
        to.changes(key, {"data.max_prompt_tokens": limit, "data.prompt_overflow": "filter"}, note)
    else:
        targets = {"data.max_prompt_tokens": limit, "data.prompt_overflow": "left"}
        to.converted(key, targets, "TRL keeps the last tokens of a prompt")


def _engine_place(to: Translation, key: str) -> None:
    """`vllm_mode`: in the training processes, a server's, or (before 0.16) a GPU of its own."""
    if to.value(key) == "device":
        return to.speed(key, "the engine has a GPU of its own: a server that the run starts", {"vllm.server_gpus": 1})
    comment = "start the server first: trl vllm-serve" if to.value(key) == "server" else ""
    return to.same(key, "vllm.mode", comment=comment)


def _output(to: Translation, key: str) -> None:
    """The folder of a run; of a path that the shell builds, the last part."""
    text = str(to.value(key))
    last = text.rstrip("/").rpartition("/")[2]
    if "$" in last or unknown(to.source.settings[key]):
        to.inert(key, "only a run can tell it: runs/NAME is taken")
    elif "$" in text:
        to.converted(key, {"output.dir": f"runs/{last}"}, "the shell builds the path: its last part")
    else:
        to.same(key, "output.dir")


def _resize(to: Translation, key: str) -> None:
    size = [side for side in listed(to.value(key)) if isinstance(side, int)]
    note = f"the script squeezes images into {' x '.join(map(str, size))}; here the aspect is kept"
    to.changes(key, {"data.image_size": max(size)} if size else {}, note)


def _sampling(to: Translation) -> Mapping[str, Any]:
    given = to.value("generation_kwargs")
    items = given.items() if isinstance(given, dict) else ()
    spelled = {name: SPELLINGS.get(name, {}).get(str(value), value) for name, value in items}
    return {name: value for name, value in spelled.items() if value is not None}


def _generation(to: Translation, key: str) -> None:
    """Further keys of sampling: plain ones among them go to their own place, those that TRL sets are left out."""
    setting, given = to.source.settings.get(key), _sampling(to)
    if setting is not None and unknown(setting):
        return to.dropped(key, RUNS)
    if not isinstance(to.value(key), dict | None):
        return to.dropped(key, "no mapping of keys to values: write one")
    away = {*UNUSABLE, *OF_TOKENIZER} - RANGES.keys()
    texts = {name for name, value in given.items() if isinstance(value, str) and name in RANGES}
    unsure = ((setting.open if setting else frozenset()) & given.keys() | texts) - away
    kept = {name: value for name, value in given.items() if name not in {*RANGES, *away, *unsure}}
    targets = {f"grpo.{name}": value for name, value in given.items() if name in RANGES and name not in unsure}
    targets |= {"grpo.generation_kwargs": kept} if kept else {}
    notes = [f"{name}: {UNUSABLE[name]}" for name in given if name in UNUSABLE and name in away]
    notes += [f"{', '.join(sorted(unsure))}: {RUNS}"] if unsure else []
    if given.get("temperature", to.value("temperature")) != to.value("temperature"):
        notes.append("there the training pass does not divide by this temperature")
    return (to.changes if notes else to.converted)(key, targets, "; ".join(notes) or "the plain keys")


OF_TOKENIZER = ("pad_token_id", "eos_token_id", "bos_token_id")


def _many_turns(to: Translation, key: str) -> None:
    what = "rollouts of several turns or with tools are not imported"
    raise ConfigError(what, where=to.where(key), fix="Take the script itself: grpo-autotune run.")


def off(why: str) -> Handler:
    """The verdict of a key that is as here where it is off, and has no equivalent where it is on."""
    return lambda to, key: to.dropped(key, why) if to.value(key) else to.inert(key, "off")


def inert(why: str) -> Handler:
    """The verdict of a key without an effect of its own."""
    return lambda to, key: to.inert(key, why)


def speed(why: str) -> Handler:
    """The verdict of a key that changes seconds and memory alone."""
    return lambda to, key: to.speed(key, why)


def _quantized(to: Translation, key: str) -> None:
    to.inert(key, "as here") if to.value(key) in (True, "nf4") else to.changes(key, {}, SAID["bnb_4bit_quant_type"])


def _computed(to: Translation, key: str) -> None:
    is_plain = to.value("bf16") is False and not to.value("fp16")
    is_other = str(to.value(key)).removeprefix("torch.") != str(to.value("dtype")).removeprefix("torch.")
    to.changes(key, {}, SAID[key]) if is_plain and is_other else to.inert(key, "bf16 and fp16 say in what is computed")


HANDLERS: dict[str, Handler] = {
    **{key: inert(why) for key, why in INERT.items()}, **{key: speed(why) for key, why in SPEED.items()},
    "dtype": _dtype, "torch_dtype": _dtype, "model_init_kwargs": _model_init, "load_in_8bit": off(SAID["load_in_8bit"]),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_use_double_quant"), _quantized),
    "bnb_4bit_compute_dtype": _computed, "generation_kwargs": _generation,
    "lora_target_modules": _lora, "lora_modules_to_save": _lora, "lora_target_parameters": _lora,
    "datasets": _mixture, "dataset_mixture": _mixture, "dataset_prompt_column": lambda to, key: to.converted(
        key, {} if to.value(key) == "prompt" else {"data.columns.prompt": to.value(key)}, "the prompt's column"
    ),
    "output_dir": _output, "resize": _resize, "warmup_ratio": _warmup, "max_prompt_length": _prompt_limit,
    "vllm_mode": _engine_place, "ignore_bias_buffers": off("for broken biases of old models under DDP"),
    **dict.fromkeys(MANY_TURNS, _many_turns),
}  # fmt: skip
