"""DeepSpeed's configuration beside that of a framework.

transformers stops where a value in it that is not `auto` differs from its own arguments
(transformers/integrations/deepspeed.py, `trainer_config_process`). So what it says of the run goes into the keys of the
run and becomes `auto`; the rest, ZeRO above all, stays DeepSpeed's. One process has nothing to share, and does without.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.reading.yaml_lines import yaml_settings
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation, nested

PREFIX = "deepspeed."
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
RUN: dict[str, tuple[str, ...]] = {
    "gradient_clipping": ("max_grad_norm",), "bf16.enabled": ("bf16",), "fp16.enabled": ("fp16",),
    "optimizer.params.lr": ("learning_rate",), "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",), "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.type": ("lr_scheduler_type",), "scheduler.params.warmup_max_lr": ("learning_rate",),
    "scheduler.params.warmup_num_steps": ("warmup_steps",),
}  # fmt: skip
"""DeepSpeed's key -> the keys of `grpo` that say the same."""
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
BLOCKS = ("optimizer", "scheduler")
"""Blocks that would win over the keys of the run, and are left out."""
ALONE = "One process has nothing to share: dropped"


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """ConfigError: alone, such a file says nothing of what is trained."""
    what = "a DeepSpeed configuration says how GPUs share the work, and not what is trained"
    fix = f"Import the configuration of the training, or write grpo.deepspeed: {source.path.name} into your own."
    raise ConfigError(what, where=str(source.path), fix=fix)


def with_file(source: Source, named: object, prefix: str) -> Source:
    """The source with the settings of a YAML or JSON file that it names, where that is at hand; its own win."""
    path = beside(source.path, named) if isinstance(named, str) and named else None
    if path is None:
        return source
    inside = yaml_settings(text_of(path), path.name)
    settings = {prefix + key: replace(setting, file=path.name) for key, setting in inside.items()}
    return replace(source, settings={**settings, **source.settings})


def zero(
    stage: int, more: Mapping[str, Any] = MappingProxyType({}), *, optimizer: str = "none", parameters: str = "none"
) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage of ZeRO, with `more` of its keys, and the devices to which states are moved
    (`none`, `cpu`)."""
    moved = {"offload_optimizer": optimizer, "offload_param": parameters}
    places = {key: {"device": device, "pin_memory": True} for key, device in moved.items() if device != "none"}
    numbers: dict[str, Any] = dict.fromkeys((*BATCH, "gradient_clipping"), "auto")
    return {**numbers, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage, **places, **more}}


def apply(to: Translation, key: str, config: Any, *, adapter: bool) -> None:
    """Verdicts of the setting `key`, which names DeepSpeed's configuration, and of the settings of its file
    (`with_file`, with `PREFIX`). Call it when all else is set.

    Args:
        to: The translation.
        key: The framework's setting.
        config: The configuration, or the path of one that is not at hand.
        adapter: True if the base weights are not trained.
    """
    file = [name for name in to.source.settings if name.startswith(PREFIX)]
    inline = _flat(config) if isinstance(config, Mapping) else {}
    values = {name.removeprefix(PREFIX): to.value(name) for name in file} or inline
    said = {f"grpo.{ours}": value for name in RUN for ours, value in _run_keys(name, values.get(name))}
    for name in file:
        ours = {f"grpo.{ours}": value for ours, value in _run_keys(name.removeprefix(PREFIX), to.value(name))}
        if ours:
            to.converted(name, ours, "in the run's own keys: DeepSpeed's would win over them")
        elif name == f"{PREFIX}optimizer.type" and to.value(name) not in ("Adam", "AdamW"):
            to.changes(name, {}, "AdamW takes its place")
        else:
            to.speed(name, "the run's" if name.removeprefix(PREFIX) in (*BATCH, *RUN) else "how GPUs share the work")
    for path, value in said.items():
        to.set(path, value, "of the DeepSpeed configuration")
    if (to.world_size or 1) > 1:
        kept = {name: "auto" if name in (*BATCH, *RUN) else value for name, value in values.items()}
        kept = {name: value for name, value in kept.items() if name.partition(".")[0] not in BLOCKS}
        note = "values that are not auto must equal the run's, or transformers stops"
        to.speed(key, note, {"grpo.deepspeed": nested(kept) if kept else config})
    elif adapter or to.values.get("model.dtype") == "float32" or to.values.get("grpo.fp16"):
        to.speed(key, ALONE)
    else:
        to.converted(key, master_weights(to), f"{ALONE}; ZeRO keeps 32-bit weights beside the bfloat16 ones, as here")


def master_weights(to: Translation) -> dict[str, Any]:
    """Targets that train weights in 32 bits and compute in bfloat16, as frameworks with master weights do: updates at a
    small learning rate vanish in bfloat16 weights."""
    engine = {"vllm.dtype": "bfloat16"} if to.values.get("grpo.use_vllm") else {}
    return {"model.dtype": "float32", "grpo.bf16": True, **engine}


def _run_keys(name: str, value: Any) -> list[tuple[str, Any]]:
    """Keys of `grpo`, with their values, that one of DeepSpeed's keys stands for; none where it is `auto`."""
    value = SCHEDULES.get(str(value)) if name == "scheduler.type" else value
    values = value if isinstance(value, list) else [value]
    return [] if value in (None, "auto") else list(zip(RUN.get(name, ()), values, strict=False))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = (_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
             for name, value in config.items())  # fmt: skip
    return {path: value for part in parts for path, value in part.items()}
