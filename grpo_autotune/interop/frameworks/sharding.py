"""Configurations of DeepSpeed and accelerate (`accelerate launch --config_file`) beside that of a framework.

transformers stops where a value in DeepSpeed's that is not `auto` differs from its own arguments
(transformers/integrations/deepspeed.py, `trainer_config_process`). So what it says of the run goes into the keys of the
run and becomes `auto`; the rest, ZeRO above all, stays DeepSpeed's. One process has nothing to share, and does without.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.config.sections.fsdp import of_file
from grpo_autotune.config.zero import ZERO as STAGES
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.files import beside, text_of, yaml_settings
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation, nested

PREFIX = "deepspeed."
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
RUN: dict[str, tuple[str, ...]] = {  # DeepSpeed's key -> the keys of `grpo` that say the same
    "gradient_clipping": ("max_grad_norm",), "bf16.enabled": ("bf16",), "fp16.enabled": ("fp16",),
    "optimizer.params.lr": ("learning_rate",), "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",), "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.type": ("lr_scheduler_type",), "scheduler.params.warmup_max_lr": ("learning_rate",),
    "scheduler.params.warmup_num_steps": ("warmup_steps",),
}  # fmt: skip
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
BLOCKS = ("optimizer", "scheduler")  # blocks that would win over the keys of the run, and are left out
LOST = "the file is not at hand: what it says of the run is lost"
ALONE = "One process has nothing to share: dropped"


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """ConfigError: alone, such a file says nothing of what is trained."""
    what = f"a configuration of {source.framework} says how processes share the work, and not what is trained"
    fix = "Import the configuration or the script of the training that goes with it."
    raise ConfigError(what, where=str(source.path), fix=fix)


def with_file(source: Source, setting: Setting | None, prefix: str) -> Source:
    """The source with the settings of the YAML or JSON file that one names, where that is at hand; its own win."""
    path = beside(source.path, setting.value) if setting and isinstance(setting.value, str) else None
    if path is None:
        return source
    inside = yaml_settings(text_of(path), path.name)
    settings = {prefix + key: replace(setting, file=path.name) for key, setting in inside.items()}
    return replace(source, settings={**settings, **source.settings})


def zero(stage: int, *, optimizer: str = "none", parameters: str = "none", **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage of ZeRO, the devices (`none`, `cpu`) of states, and `more` of its keys."""
    moved = {"offload_optimizer": optimizer, "offload_param": parameters}
    places = {key: {"device": device, "pin_memory": True} for key, device in moved.items() if device != "none"}
    numbers: dict[str, Any] = dict.fromkeys((*BATCH, "gradient_clipping"), "auto")
    return {**numbers, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage, **places, **more}}


def apply_deepspeed(to: Translation, key: str, config: Any, *, adapter: bool) -> None:
    """Verdicts of the setting `key`, which names DeepSpeed's `config` (or the path of one that is not at hand), and of
    its file's, when all else is set; `adapter` is true if the base weights are not trained."""
    file = {name.removeprefix(PREFIX): to.value(name) for name in to.source.settings if name.startswith(PREFIX)}
    values = file or (_flat(config) if isinstance(config, Mapping) else {})
    for name, value in values.items():
        _say(to, name, value, in_file=name in file)
    if (to.world_size or 1) > 1 and not values and str(config) not in STAGES:
        to.changes(key, {}, f"{LOST}, and nothing is sharded: set `grpo.deepspeed`")
        return
    if (to.world_size or 1) > 1:
        kept = {name: "auto" if name in (*BATCH, *RUN) else value for name, value in values.items()}
        kept = {name: value for name, value in kept.items() if name.partition(".")[0] not in BLOCKS}
        note = "values that are not auto must equal the run's, or transformers stops"
        to.speed(key, note, {"grpo.deepspeed": nested(kept) if kept else config})
        return
    moved = any("offload" in name and value in ("cpu", "nvme") for name, value in values.items())
    master = {} if adapter or to.values.get("model.dtype") == "float32" else master_weights(to)
    notes = {
        ALONE: True, "what it moved off the GPU stays there": moved,
        "ZeRO keeps 32-bit weights beside the 16-bit ones, as here": master,
        LOST: not values,
    }  # fmt: skip
    note = "; ".join(text for text, holds in notes.items() if holds)
    to.verdict("converted" if values and master else "speed" if values else "changes", key, master, note)


def master_weights(to: Translation) -> dict[str, Any]:
    """Targets that train weights in 32 bits and compute in 16: small updates vanish in bfloat16 weights."""
    flag, kind = ("fp16", "float16") if to.values.get("grpo.fp16") else ("bf16", "bfloat16")
    engine = {"vllm.dtype": kind} if to.values.get("grpo.use_vllm") else {}
    return {"model.dtype": "float32", f"grpo.{flag}": True, **engine}


def _say(to: Translation, name: str, value: Any, *, in_file: bool) -> None:
    key, value = PREFIX + name, SCHEDULES.get(str(value)) if name == "scheduler.type" else value
    parts = [] if value in (None, "auto") else value if isinstance(value, list) else [value]
    ours = {f"grpo.{path}": part for path, part in zip(RUN.get(name, ()), parts, strict=False)}
    for path, part in ours.items():
        for other in [other for other, row in to.rows.items() if row.to.get(path, part) != part]:
            to.changes(other, {}, f"the DeepSpeed configuration says {part}, which is taken; transformers stops there")
        to.set(path, part, "of the DeepSpeed configuration")
    if not in_file:
        return
    if name == "scheduler.type" and ours and to.value(f"{PREFIX}scheduler.params.warmup_type") != "linear":
        to.changes(key, ours, "DeepSpeed's warm-up follows a logarithm, here a line")
    elif ours:
        to.converted(key, ours, "in the run's own keys: DeepSpeed's would win over them")
    elif name == "optimizer.type" and value not in ("Adam", "AdamW"):
        to.changes(key, {}, "AdamW takes its place")
    else:
        is_of_run = name in (*BATCH, *RUN) or name.partition(".")[0] in BLOCKS
        to.speed(key, "the run's" if is_of_run else "how GPUs share the work")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = (_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
             for name, value in config.items())  # fmt: skip
    return {path: value for part in parts for path, value in part.items()}


LAUNCH = "launch."
ZERO = f"{LAUNCH}deepspeed_config."
FSDP = f"{LAUNCH}fsdp_config."


def with_launch(source: Source) -> Source:
    """The source with the launcher's options under `LAUNCH`, over accelerate's file, and with its DeepSpeed file."""
    options = {LAUNCH + key: setting for key, setting in source.launch.items() if key != "config_file"}
    source = replace(source, settings={**options, **source.settings})
    source = with_file(source, source.launch.get("config_file"), LAUNCH)
    return with_file(source, source.settings.get(f"{ZERO}deepspeed_config_file"), PREFIX)


def processes(to: Translation) -> int | None:
    """Training processes by the launcher: of `accelerate launch`, its option or its file, or of torchrun."""
    if to.given(f"{LAUNCH}nproc_per_node"):
        return int(to.number(f"{LAUNCH}nproc_per_node") * (to.number(f"{LAUNCH}nnodes") or 1))
    count = to.number(f"{LAUNCH}num_processes")
    return None if count is None else int(count)


def apply_launch(to: Translation, *, adapter: bool) -> None:
    """Verdicts of the launcher's settings. Call it when all else is set; `adapter` as in `apply_deepspeed`."""
    for key in [key for key in to.source.settings if key.startswith(LAUNCH)]:
        if key == f"{LAUNCH}mixed_precision":
            _precision(to, key)
        elif key.endswith(("_tp_size", "_cp_size", "_sp_size")) and (to.number(key) or 1) > 1:
            to.dropped(key, "processes that share a sequence or a layer: each one here has data of its own")
        else:
            to.speed(key, "how processes are started and share the work")
    if (stage := to.value(f"{ZERO}zero_stage")) is not None:
        names = {"optimizer": "offload_optimizer_device", "parameters": "offload_param_device"}
        options: dict[str, Any] = {ours: str(to.value(f"{ZERO}{name}") or "none") for ours, name in names.items()}
        if to.value(f"{ZERO}zero3_save_16bit_model"):
            options["stage3_gather_16bit_weights_on_model_save"] = True
        clip = {"gradient_clipping": to.value(f"{ZERO}gradient_clipping", "auto")}
        apply_deepspeed(to, f"{ZERO}zero_stage", zero(int(stage), **options) | clip, adapter=adapter)
    elif to.given(f"{ZERO}deepspeed_config_file"):
        apply_deepspeed(to, f"{ZERO}deepspeed_config_file", to.value(f"{ZERO}deepspeed_config_file"), adapter=adapter)
    elif to.value(f"{LAUNCH}distributed_type") == "FSDP":
        sharing = {key.removeprefix(FSDP): to.value(key) for key in to.source.settings if key.startswith(FSDP)}
        fully_sharded(to, f"{LAUNCH}distributed_type", sharing)


def fully_sharded(to: Translation, key: str, options: dict[str, Any]) -> None:
    """The verdict of `key`, which asks for FSDP with these options of accelerate's file."""
    if (to.world_size or 1) > 1:
        options = of_file(options)
        checkpointing = {"grpo.gradient_checkpointing": False} if options.get("activation_checkpointing") else {}
        to.speed(key, "FSDP2", {"grpo.fsdp_config": options, **checkpointing})
    else:
        to.speed(key, ALONE)


def _precision(to: Translation, key: str) -> None:
    """bf16 and fp16 of the run win over the launcher's (transformers/training_args.py); TRL's default is bf16."""
    if to.given("bf16") or to.given("fp16") or to.value("bf16") is None:
        return to.inert(key, "the run's own bf16 or fp16 wins")
    return to.converted(key, {f"grpo.{name}": str(to.value(key)) == name for name in ("bf16", "fp16")})
