"""DeepSpeed's configuration beside that of a framework.

transformers stops where a value in it that is not `auto` differs from its own arguments
(transformers/integrations/deepspeed.py, `trainer_config_process`). So what it says of the run goes into the keys of the
run and becomes `auto`, and the rest of it, ZeRO above all, stays DeepSpeed's. One process has nothing to share, and
does without it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.reading.yaml_lines import yaml_settings
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation, nested

AUTO = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
}  # fmt: skip
RUN: dict[str, tuple[str, ...]] = {
    "gradient_clipping": ("max_grad_norm",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.params.warmup_max_lr": ("learning_rate",),
    "scheduler.params.warmup_num_steps": ("warmup_steps",),
    "bf16.enabled": ("bf16",),
    "fp16.enabled": ("fp16",),
}
"""DeepSpeed's keys that are said in the keys of `grpo`."""
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
LEFT_OUT = ("optimizer", "scheduler")
"""Blocks that become keys of `grpo`: DeepSpeed's own would win over them."""


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """ConfigError: alone, such a file says nothing of what is trained."""
    what = "a DeepSpeed configuration says how GPUs share the work, and not what is trained"
    fix = f"Name the training configuration that goes with it, or give this file to your own: grpo.deepspeed: {source.path}"
    raise ConfigError(what, where=str(source.path), fix=f"{fix} (values that are not auto must equal yours).")


def with_file(source: Source, named: object, prefix: str = "") -> Source:
    """The source with the settings of a YAML or JSON file that it names, if that is at hand; the source's own win."""
    path = beside(source.path, named) if isinstance(named, str) and named else None
    if path is None:
        return source
    inside = yaml_settings(text_of(path), path.name)
    settings = {prefix + key: replace(setting, file=path.name) for key, setting in inside.items()}
    return replace(source, settings={**settings, **source.settings})


def zero(stage: int, *, optimizer: str = "none", parameters: str = "none", **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage of ZeRO, with the devices to which states are moved (`none`, `cpu`)."""
    moved = {"offload_optimizer": optimizer, "offload_param": parameters}
    places = {key: {"device": device, "pin_memory": True} for key, device in moved.items() if device != "none"}
    return {**AUTO, "zero_optimization": {"stage": stage, **places, **more}}


def apply(to: Translation, key: str, config: Mapping[str, Any] | str, *, adapter: bool) -> None:
    """Give the setting `key`, which names the configuration, its verdict, and those of its file theirs (`with_file`,
    with the prefix `deepspeed.`). `config` is its content, or the path of a file that is not at hand. Call it when the
    batch and the other keys are set.

    Args:
        to: The translation.
        key: The framework's setting.
        config: DeepSpeed's configuration, or a path.
        adapter: True if the base weights are not trained.
    """
    file = {name.removeprefix("deepspeed."): name for name in to.source.settings if name.startswith("deepspeed.")}
    values = {name: to.value(whole) for name, whole in file.items()} or (
        _flat(config) if isinstance(config, Mapping) else {}
    )
    for name, value in values.items():
        _said(to, file.get(name, key), name, value)
    if (to.world_size or 1) > 1:
        kept = {name: "auto" if name in RUN or name in AUTO else value for name, value in values.items()}
        kept = {name: value for name, value in kept.items() if name.partition(".")[0] not in LEFT_OUT}
        note = "values that are not auto must equal those of the run, or transformers stops"
        to.speed(key, note, {"grpo.deepspeed": nested(kept) if kept else config})
        return
    note = "nothing to share on one process: dropped"
    if adapter or to.values.get("model.dtype") == "float32" or to.values.get("grpo.fp16"):
        to.speed(key, note)
    else:
        to.converted(key, master_weights(to), f"{note}; ZeRO keeps 32-bit weights beside the bfloat16 ones")


def master_weights(to: Translation) -> dict[str, Any]:
    """Targets that train weights in 32 bits and compute in bfloat16, as frameworks with master weights do: updates of a
    small learning rate vanish in bfloat16 weights."""
    engine = {"vllm.dtype": "bfloat16"} if to.values.get("grpo.use_vllm") else {}
    return {"model.dtype": "float32", "grpo.bf16": True, **engine}


def _said(to: Translation, key: str, name: str, value: Any) -> None:
    """What one of DeepSpeed's keys says of the run; `key` is the setting whose row tells it."""
    if value == "auto":
        note, targets = "auto: as the run has it", {}
    elif name in AUTO:
        note, targets = "follows from the batch of the run (auto)", {}
    elif name in RUN:
        parts = value if isinstance(value, list) else [value]
        note, targets = "said in the run's own key", {f"grpo.{to_key}": part for to_key, part in zip(RUN[name], parts)}
    elif name == "scheduler.type" and value in SCHEDULES:
        note, targets = "the warm-up is a line here", {"grpo.lr_scheduler_type": SCHEDULES[value]}
    else:
        note, targets = "how GPUs share the work", {}
    if key == "deepspeed" or not key.startswith("deepspeed."):
        for path, part in targets.items():
            to.set(path, part, f"{name} of the DeepSpeed configuration")
    elif targets:
        to.converted(key, targets, note)
    elif name.startswith(LEFT_OUT) and value not in ("auto", "AdamW", "Adam"):
        to.changes(key, {}, "DeepSpeed's own optimizer or schedule: transformers' AdamW takes its place")
    else:
        to.speed(key, note)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key paths of a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + str(name): value}
    return flat
