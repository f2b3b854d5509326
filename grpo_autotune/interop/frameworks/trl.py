"""TRL's own configurations: `TrlParser` YAML, command lines (`trl grpo`, `accelerate launch grpo.py`) and scripts.

Every key is either TRL 1.16's own, and then goes where it is here, or has a row in `HANDLERS`. What a release defaulted
to is written out where TRL 1.16 differs. open-r1, VLM-R1, R1-V and Unsloth are TRL with other defaults, other rewards
and other data: their modules change the source or the defaults, and come here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.renamed_keys import MOVED, SAID
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.batch import SixNumbers
from grpo_autotune.interop.frameworks import accelerate, deepspeed, trl_script
from grpo_autotune.interop.frameworks.trl_versions import DEFAULTS, Version, choose, defaults
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.reading.yaml_lines import yaml_settings
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

Handler = Callable[[Translation, str], None]
Rewards = Callable[[Translation], list[dict[str, Any]]]

MODEL = {"use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_task_type": "CAUSAL_LM"}
"""Defaults of TRL's `ModelConfig`, of a command line that is, the same in all releases."""
BATCH = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "steps_per_generation",
    "generation_batch_size", "num_iterations",
)  # fmt: skip
TO_VLLM = {trl: f"vllm.{ours}" for ours, trl in VLLM_TO_TRL.items()}
PLACES = {
    **TO_VLLM,
    "model_name_or_path": "model.name_or_path", "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code", "load_in_4bit": "model.load_in_4bit",
    "chat_template": "model.chat_template", "system_prompt": "data.system_prompt",
    "lora_alpha": "peft.lora_alpha", "lora_task_type": "peft.task_type", "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora", "lora_bias": "peft.bias", "max_pixels": "data.max_pixels",
    "min_pixels": "data.min_pixels", "freeze_vision_modules": "model.freeze_vision_tower",
    "vllm_importance_sampling_cap": "grpo.vllm_importance_sampling_clip_max",
}  # fmt: skip
"""Key -> the key path that means the same, beside `config.renamed_keys.MOVED`."""
SPEED = {
    "ds3_gather_for_generation": "how ZeRO-3 gathers weights", "ddp_find_unused_parameters": "how ranks synchronise",
    "dataset_num_proc": "processes that prepare data", "preprocessing_num_workers": "processes that prepare data",
    "bnb_4bit_quant_storage": "how 4-bit weights are stored", "dataset_streaming": "here the data is downloaded first",
    "gradient_checkpointing_use_reentrant": "the kind of checkpointing", "num_processes": "the number of processes",
}  # fmt: skip
REWARDS = {
    "accuracy_reward": {"name": "accuracy_reward"},
    "reasoning_accuracy_reward": {"name": "reasoning_accuracy_reward"},
    "think_format_reward": {"name": "think_format_reward"},
    "get_soft_overlong_punishment": {
        "name": "soft_overlong_punishment", "params": {"max_completion_len": 1280, "soft_punish_cache": 256},
    },
}  # fmt: skip
"""Names of `trl grpo --reward_funcs` -> items of `rewards` (trl/scripts/grpo.py)."""


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of a TRL configuration; ConfigError in one line where there is none."""
    return translated(source, choose(source, version), world_size)


def translated(
    source: Source, release: tuple[Version, str, str], world_size: int | None, *,
    over: Mapping[str, Any] | None = None, unread: Mapping[str, str] | None = None, rewards: Rewards | None = None,
    handlers: Mapping[str, Handler] | None = None, micro: tuple[int, str] | None = None,
) -> Translation:  # fmt: skip
    """A configuration of TRL or of a framework built on it.

    Args:
        source: What the file says, in the names of TRL's command line.
        release: TRL's release, as `trl_versions.choose` gives it.
        world_size: As `Translation` has it.
        over: Defaults of the framework over TRL's.
        unread: Keys that the framework's trainer takes and never reads, and why; `over` has what it does instead.
        rewards: Makes the items of `rewards`; TRL's names otherwise.
        handlers: What the framework's own keys become, over `HANDLERS`.
        micro: Completions per device where the framework changes their number, and how.
    """
    source = accelerate.with_launch(_with_config(trl_script.unified(source)))
    if (named := source.settings.get("deepspeed")) is not None:
        source = deepspeed.with_file(source, named.value, "deepspeed.")
    number, name, why = release
    is_script = trl_script.is_script(source)
    over = {**(trl_script.NO_PEFT if is_script else {}), **(over or {})}
    weights = "auto" if is_script and number == (0, 26) else "float32"
    base = {**MODEL, "dtype": weights, **defaults(number), **over}
    said, unread = source, unread or {}
    source = replace(source, settings={key: value for key, value in source.settings.items() if key not in unread})
    to = Translation(source, base, name, why, world_size)
    _batch(to, number, micro)
    liger = {"use_liger_kernel": _fast_kernels} if number < (0, 28) else {}
    table = {**HANDLERS, **liger, **(handlers or {})}
    to.verdict("converted", "reward_funcs", {"rewards": (rewards or _rewards)(to)}, "functions by name")
    for key in [*source.settings, *DEFAULTS, *over, *(MODEL if to.value("use_peft") else ()), "dtype"]:
        if key not in to.rows and not key.startswith((accelerate.PREFIX, "deepspeed.")):
            _handler(to, key, table)(to, key)
    if to.value("use_vllm") and number < (0, 16) and not to.given("top_k"):
        to.set("grpo.top_k", 0, "vLLM had no limit in this release")
    if not to.values.get("data.path"):
        raise ConfigError("no data set is named", where=source.path.name, fix=DATA_FIX)
    accelerate.apply(to, adapter=bool(to.value("use_peft")))
    if named is not None:
        deepspeed.apply(to, "deepspeed", str(named.value), adapter=bool(to.value("use_peft")))
    to.source = said
    for key in said.settings.keys() & unread.keys():
        to.inert(key, unread[key])
    return to


def _with_config(source: Source) -> Source:
    """The source with the YAML that `--config` names, over which the command line wins."""
    named = source.settings.get("config")
    path = beside(source.path, str(named.value)) if named else None
    if path is None:
        return source
    inside = yaml_settings(text_of(path), path.name, nested=False)
    return replace(source, settings={**{k: replace(s, file=path.name) for k, s in inside.items()}, **source.settings})


RUNS = "only a run of the program can tell its value: set it by hand"
DATA_FIX = "What a program builds cannot be read: save the data to a file, and write a configuration that names it."


def _handler(to: Translation, key: str, table: Mapping[str, Handler]) -> Handler:
    """What to do with a key: its own handler, or what its kind asks for."""
    if key.startswith("vllm_") and not to.value("use_vllm"):
        return _inert("vLLM is off")
    if key.startswith("lora_") and not to.value("use_peft"):
        return _inert("without use_peft the whole model is trained")
    if key in table:
        return table[key]
    if key.startswith(("hub_", "push_to_hub")):
        return _dropped("nothing is published: push the trained folder yourself")
    if key in SPEED:
        return lambda to, key: to.speed(key, SPEED[key])
    return _plain


def _inert(why: str) -> Handler:
    return lambda to, key: to.inert(key, why) if to.given(key) else None


def _dropped(why: str) -> Handler:
    return lambda to, key: to.dropped(key, why) if to.given(key) else None


def _plain(to: Translation, key: str) -> None:
    """A key of the same meaning, under its name or another one; a key that is not known gets no verdict."""
    target = PLACES.get(key) or (f"grpo.{key}" if key in grpo_keys() else MOVED.get(key))
    if target is None:
        return to.dropped(key, SAID[key]) if key in SAID else None
    setting = to.source.settings.get(key)
    known = grpo_keys().get(key)
    value = to.value(key)
    if setting is not None and unknown(setting):
        return to.dropped(key, RUNS)
    if value is None and to.given(key) and (known is None or not known.allows(None)):
        return to.inert(key, "null: the default")
    if known is not None and not known.allows(value):
        if not to.given(key):
            return None
        accepted = known.accepted()
        raise ConfigError(f"{value!r} is not accepted", where=to.where(key), fix=f"Accepted: {accepted}.")
    return to.same(key, target)


def unknown(setting: Setting) -> bool:
    """True for a value that only a run of its program can tell."""
    return isinstance(setting.value, str) and setting.text == setting.value


def _batch(to: Translation, version: Version, changed: tuple[int, str] | None) -> None:
    """The six numbers: TRL 0.14 counts prompts per device, 0.15 to 0.17 generate in each micro step."""
    ranks = accelerate.processes(to) or _torchrun(to) or to.world_size
    if ranks is None:
        to.warnings.append("the file does not say how many processes train: 1 is assumed (--world-size)")
    ranks = ranks or 1
    group, micro = to.number("num_generations"), to.number("per_device_train_batch_size")
    accumulation, passes = to.number("gradient_accumulation_steps"), to.number("num_iterations")
    notes = []
    if version < (0, 15):
        notes.append(f"per_device_train_batch_size counts prompts: {micro} x {group} completions")
        micro *= group
    if changed:
        micro, note = changed
        notes.append(note)
    rollout = micro * ranks * (to.number("steps_per_generation") or accumulation)
    if version < (0, 18):
        rollout = micro * ranks
        notes.append("completions are generated in each micro step")
    elif to.number("generation_batch_size"):
        rollout = to.number("generation_batch_size")
    if rollout % group:
        what = f"a rollout of {rollout} completions is no whole number of groups of {group}"
        raise ConfigError(what, where=to.where("num_generations"), fix="Say how many processes train: --world-size.")
    batch = SixNumbers(group, rollout // group, micro * ranks * accumulation, passes, ranks, micro)
    to.set_batch(batch, [key for key in BATCH if to.given(key) or key in BATCH[:3]], "; ".join(notes))


def _torchrun(to: Translation) -> int | None:
    """Processes that torchrun starts, on all nodes."""
    launch = {name.replace("-", "_"): setting.value for name, setting in to.source.launch.items()}
    per_node, nodes = launch.get("nproc_per_node"), launch.get("nnodes", 1)
    return per_node * (nodes if isinstance(nodes, int) else 1) if isinstance(per_node, int) else None


def _rewards(to: Translation) -> list[dict[str, Any]]:
    """Items of `rewards` from names that TRL's command line knows, dotted paths, and functions of a script."""
    names = listed(to.value("reward_funcs"))
    is_script = trl_script.is_script(to.source)
    items = trl_script.rewards(to, names) if is_script else [_reward(to, name) for name in names]
    return weighted(to, items)


def _reward(to: Translation, name: str) -> dict[str, Any]:
    if name in REWARDS:
        return dict(REWARDS[name])
    module, _, function = name.rpartition(".")
    if module:
        return {"name": f"{module}:{function}"}
    fix = f"Known: {', '.join(REWARDS)}, or module.function."
    raise ConfigError(f"TRL has no reward {name}", where=to.where("reward_funcs"), fix=fix)


def weighted(to: Translation, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same items with the weights of `reward_weights`. ConfigError where there are no items."""
    if not items:
        fix = "Name a function: --reward_funcs accuracy_reward. A reward model is to be called by one."
        raise ConfigError("no reward function", where=to.source.path.name, fix=fix)
    weights = listed(to.value("reward_weights")) if to.given("reward_weights") else []
    if not weights:
        return items
    if len(weights) != len(items):
        what = f"{len(weights)} weights for {len(items)} rewards"
        raise ConfigError(what, where=to.where("reward_weights"), fix="Give one weight for each reward.")
    to.inert("reward_weights", "weights of the rewards")
    return [{**item, "weight": float(weight)} for item, weight in zip(items, weights, strict=True)]


def listed(value: Any) -> list[Any]:
    """A value as a list: one item is often written without."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _dtype(to: Translation, key: str) -> None:
    value = str(to.value(key)).removeprefix("torch.")
    note = "" if to.given(key) or value != "float32" else "without it TRL loads the weights in 32 bits"
    if key == "dtype" and to.given("torch_dtype"):
        return
    if value in ("auto", "float32", "bfloat16", "float16"):
        to.same(key, "model.dtype", value, note, comment=note)
    else:
        to.converted(key, {"model.dtype": "float32"}, "null: transformers 4 loads the weights in 32 bits")


def _model_init(to: Translation, key: str) -> None:
    names = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation",
             "revision": "revision", "trust_remote_code": "trust_remote_code"}  # fmt: skip
    given = to.value(key) if isinstance(to.value(key), dict) else {}
    kept = {f"model.{names[name]}": value for name, value in given.items() if name in names}
    if "model.dtype" in kept:
        kept["model.dtype"] = str(kept["model.dtype"]).removeprefix("torch.")
    lost = [name for name in given if name not in names]
    verdict = to.changes if lost else to.converted
    verdict(key, kept, f"no place for {', '.join(lost)}" if lost else "the model section")


def _lora(to: Translation, key: str) -> None:
    """A key of LoRA; TRL unwraps a list of one, and a comma behind a name of a shell's list stays in it."""
    place = {"lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save",
             "lora_target_parameters": "target_parameters", "lora_r": "r"}.get(key, key)  # fmt: skip
    value = to.value(key)
    if not isinstance(value, list):
        return to.same(key, f"peft.{place}")
    clean = [str(name).rstrip(",") for name in value]
    if clean != value:
        kept = [name for name in map(str, value) if not name.endswith(",")]
        to.warnings.append(
            f"{to.where(key)}: the commas are part of the names, so PEFT adapts {kept or 'nothing'} alone"
        )
        return to.changes(key, {f"peft.{place}": clean}, f"without the commas; as written, {kept or 'nothing'} alone")
    if value == ["all-linear"]:
        return to.converted(key, {f"peft.{place}": "all-linear"}, "a list of one is unwrapped")
    return to.same(key, f"peft.{place}")


def _data(to: Translation, key: str) -> None:
    if trl_script.is_script(to.source):
        note = (
            "the script's own code makes the prompts (map, filter): it is not run, so write data.columns or a template"
        )
        to.changes(key, {"data.path": to.value(key)}, note, comment="rows as they are published")
    else:
        to.same(key, "data.path")


def _resize(to: Translation, key: str) -> None:
    size = [side for side in listed(to.value(key)) if isinstance(side, int)]
    if size:
        note = f"the script squeezes images into {' x '.join(map(str, size))}; here the aspect is kept"
        to.changes(key, {"data.image_size": max(size)}, note)


def _many_turns(to: Translation, key: str) -> None:
    what = "rollouts of several turns or with tools are not imported"
    raise ConfigError(what, where=to.where(key), fix="Take the script itself: grpo-autotune run.")


def _split(to: Translation, key: str) -> None:
    """The held-out split, which TRL reads with evaluation on alone."""
    if to.value("eval_strategy", "no") in ("no", False):
        return _inert("evaluation is off")(to, key)
    return to.same(key, "data.eval_split")


def _evaluation(to: Translation, key: str) -> None:
    to.same(key, "grpo.eval_strategy", "no" if to.value(key) is False else None)
    if to.value(key) not in ("no", False) and not to.given("dataset_test_split") and to.source.program is not None:
        to.set("data.eval_split", "test", "TRL's default")


def _mixture(to: Translation, key: str) -> None:
    """Data sets joined to one: a mixture without weights, each row once per epoch."""
    value = to.value(key)
    given = value if isinstance(value, dict) else {"datasets": value}
    parts = {}
    for place, one in enumerate(listed(given.get("datasets"))):
        share = one.get("fraction", one.get("weight"))
        share = {"subsample": share} if isinstance(share, float) and share < 1 else {}
        path = {"path": one.get("path") or one.get("id"), "name": one.get("name") or one.get("config")}
        part = {name: text for name, text in {**path, "split": one.get("split", "train")}.items() if text}
        parts[f"part{place + 1}"] = {**part, **share}
    if len(parts) == 1:
        to.converted(key, {f"data.{name}": text for name, text in parts["part1"].items()}, "one data set")
    elif parts:
        to.converted(key, {"data.path": "mixture", "data.mix": parts}, f"{len(parts)} data sets joined")
    if given.get("test_split_size"):
        to.set("data.split_ratio", given["test_split_size"], "test_split_size")


def _warmup(to: Translation, key: str) -> None:
    ratio = to.number(key)
    if to.number("warmup_steps", 0):
        to.inert(key, "warmup_steps wins over it")
    elif ratio:
        to.converted(key, {"grpo.warmup_steps": ratio}, "below 1 it is a share of all steps")
    else:
        to.inert(key, "no warm-up")


def _prompt_limit(to: Translation, key: str) -> None:
    """Old releases keep a prompt's last tokens."""
    setting = to.source.settings.get(key)
    if setting is not None and unknown(setting):
        return to.dropped(key, RUNS)
    limit = to.number(key)
    if limit is None:
        return _inert("no limit")(to, key)
    if any(name in to.source.settings for name in ("resize", "finetune_vision_layers", "max_pixels")):
        targets = {"data.max_prompt_tokens": limit, "data.prompt_overflow": "filter"}
        return to.changes(key, targets, "rows with longer prompts are left out; TRL cuts them, through an image too")
    targets = {"data.max_prompt_tokens": limit, "data.prompt_overflow": "left"}
    return to.converted(key, targets, "TRL keeps the last tokens of a prompt")


def _engine_place(to: Translation, key: str) -> None:
    """`vllm_mode`: in the training processes, a server's, or (before 0.16) a GPU of its own."""
    mode = to.value(key)
    if mode == "device":
        to.speed(key, "the engine has a GPU of its own: a server that the run starts", {"vllm.server_gpus": 1})
    elif mode == "server":
        to.same(key, "vllm.mode", comment="start the server first: trl vllm-serve")
    else:
        to.same(key, "vllm.mode")


def _at_server(handler: Handler) -> Handler:
    """The same with a server alone: in the training process nothing asks for it."""

    def handle(to: Translation, key: str) -> None:
        is_server = to.value("vllm_mode") == "server"
        (handler if is_server else _inert("the engine is in the training process"))(to, key)

    return handle


def _in_process(to: Translation, key: str) -> None:
    if to.value("vllm_mode") == "server":
        return _inert("the server has its own")(to, key)
    return to.same(key, TO_VLLM[key])


def _scale(to: Translation, key: str) -> None:
    value = to.value(key)
    to.same(key, f"grpo.{key}", {True: "group", False: "none"}.get(value, value) if isinstance(value, bool) else value)


def _fast_kernels(to: Translation, key: str) -> None:
    to.speed(key, "kernels of the model's layers; TRL 1.16 means its fused loss by this key, which is left off")


def _kl(to: Translation, key: str) -> None:
    """The KL term's correction, which matters with a KL term alone."""
    if to.number("beta"):
        to.same(key, f"grpo.{key}", comment="the KL term as the source has it" if not to.given(key) else "")
    elif to.given(key):
        to.inert(key, "beta is 0")


def _top_k(to: Translation, key: str) -> None:
    value = to.number(key)
    to.same(key, "grpo.top_k", 0 if value in (None, -1) else value)


def _references(to: Translation, key: str) -> None:
    if to.value("sync_ref_model"):
        return _plain(to, key)
    return _inert("the reference is not synchronised")(to, key)


def _correction(to: Translation, key: str) -> None:
    if key != "vllm_importance_sampling_correction" and not to.value("vllm_importance_sampling_correction"):
        return _inert("the correction is off")(to, key)
    if to.value(key) is None:
        return _inert("null: the default")(to, key)
    return _plain(to, key)


def _four_bit(to: Translation, key: str) -> None:
    if not to.value("load_in_4bit"):
        return _inert("4 bits are off")(to, key)
    return to.changes(key, {}, SAID["bnb_4bit_quant_type"])


HANDLERS: dict[str, Handler] = {
    "dtype": _dtype, "torch_dtype": _dtype, "model_init_kwargs": _model_init,
    "model_revision": lambda to, key: to.same(key, "model.revision"),
    "load_in_8bit": lambda to, key: to.dropped(key, SAID[key]) if to.value(key) else to.inert(key, "off"),
    "bnb_4bit_quant_type": lambda to, key: (
        to.inert(key, "as here") if to.value(key) == "nf4" else _four_bit(to, key)
    ),
    "use_bnb_nested_quant": _four_bit,
    "dataset_name": _data, "resize": _resize,
    **dict.fromkeys(("rollout_func", "environment_factory", "tools"), _many_turns),
    "use_peft": lambda to, key: to.inert(key, "the peft section") if to.given(key) else None,
    "lora_r": _lora, "lora_dropout": _lora, "lora_target_modules": _lora, "lora_modules_to_save": _lora,
    "lora_target_parameters": _lora,
    "dataset_test_split": _split, "eval_strategy": _evaluation, "evaluation_strategy": _evaluation,
    "datasets": _mixture, "dataset_mixture": _mixture,
    "dataset_prompt_column": lambda to, key: to.converted(
        key, {"data.columns.prompt": to.value(key)} if to.value(key) != "prompt" else {}, "the prompt's column"
    ),
    "reward_model_name_or_path": _dropped(SAID["reward_model_name_or_path"]),
    "ignore_bias_buffers": _dropped("for broken biases of old models under DDP"),
    "output_dir": lambda to, key: to.same(key, "output.dir"),
    "resume_from_checkpoint": _inert("go on with the option --resume"),
    "overwrite_output_dir": _inert("another folder is given with output.dir"),
    "do_train": _inert("always"), "do_eval": _inert("eval_strategy decides"),
    "wandb_entity": _dropped(SAID["wandb_entity"]), "wandb_project": _dropped(SAID["wandb_project"]),
    "config": _inert("read as well"), "accelerate_config": _inert("how processes are started"),
    "local_rank": _inert("the launcher says it"), "logging_nan_inf_filter": _dropped("a loss of NaN stops the run"),
    "warmup_ratio": _warmup, "max_prompt_length": _prompt_limit, "top_k": _top_k, "scale_rewards": _scale,
    "use_bias_correction_kl": _kl, "ref_model_mixup_alpha": _references, "ref_model_sync_steps": _references,
    "vllm_mode": _engine_place, "vllm_gpu_memory_utilization": _in_process, "vllm_tensor_parallel_size": _in_process,
    "vllm_device": _inert("the engine's GPU: vllm_mode decides"),
    **{name: _at_server(_plain) for name in TO_VLLM if "server" in name or name == "vllm_group_port"},
    "vllm_importance_sampling_correction": _correction, "vllm_importance_sampling_mode": _correction,
    "vllm_importance_sampling_clip_max": _correction, "vllm_importance_sampling_cap": _correction,
}  # fmt: skip
