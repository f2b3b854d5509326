"""ms-swift: `swift rlhf`, `megatron rlhf` and Ray's YAML, with `rlhf_type: grpo`.

Its batches count completions. `steps_per_generation` counts micro steps in `swift rlhf`, and global batches in Megatron
and Ray (docs/source_en/Megatron-SWIFT/GRPO.md).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.batch import SixNumbers
from grpo_autotune.interop.frameworks import accelerate, deepspeed, swift_keys, swift_run
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

ZERO = {
    "zero0": deepspeed.zero(0), "zero1": deepspeed.zero(1), "zero2": deepspeed.zero(2),
    "zero2_offload": deepspeed.zero(2, optimizer="cpu"),
    "zero3": deepspeed.zero(3, stage3_prefetch_bucket_size=0, stage3_gather_16bit_weights_on_model_save=True),
    "zero3_offload": deepspeed.zero(
        3, optimizer="cpu", parameters="cpu", stage3_prefetch_bucket_size=0, stage3_gather_16bit_weights_on_model_save=True
    ),
}  # fmt: skip
"""What swift's names stand for (swift/config/*.json; the prefetch of ZeRO 3 is off, swift/rlhf_trainers/arguments.py)."""
FSDP2 = {
    "version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True,
}  # fmt: skip
GROUPS = ("train", "rollout", "teacher")
"""Roles of Ray's YAML, each with its GPUs and keys."""


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """What becomes of ms-swift's settings. ConfigError for another algorithm than GRPO, and for rollouts that TRL has
    no part of (several turns, environments, reward models)."""
    source, names = prepared(source)
    megatron = "megatron" in (source.program or "") or "global_batch_size" in source.settings
    version, reason = _version(source, names, version)
    to = Translation(source, _defaults(version, megatron), version, reason, world_size)
    _refuse(to)
    batch(to, megatron, version)
    swift_run.translate(to, megatron, version)
    _sharding(to, megatron)
    _rest(to)
    to.rows = {key: row.model_copy(update={"key": names.get(key, key)}) for key, row in to.rows.items()}
    return to


def prepared(source: Source) -> tuple[Source, dict[str, str]]:
    """The source under the newest names: with a file that `--config` names, Ray's groups dissolved, variables that are
    settings among these, and accelerate's. Second, the newest name of a setting -> the name in the file."""
    config = source.settings.get("config")
    source = accelerate.with_launch(source if config is None else deepspeed.with_file(source, config.value))
    deep = source.settings.get("deepspeed")
    source = source if deep is None else deepspeed.with_file(source, deep.value, "deepspeed.")
    settings: dict[str, Setting] = {}
    names: dict[str, str] = {}
    for key, setting in source.settings.items():
        group, dot, inner = key.partition(".")
        if key in GROUPS and isinstance(setting.value, Mapping):
            parts = {f"{key}.{name}": replace(setting, value=value, text=None) for name, value in setting.value.items()}
        else:
            parts = {key: setting}
        for path, part in parts.items():
            group, _, inner = path.partition(".")
            name = inner if group in ("train", "rollout") and inner != "gpus" else path
            name = swift_keys.RENAMED.get(name, name)
            if name != path:
                names[name] = path
            settings[name] = part
    variables = {key: setting for key, setting in source.environment.items() if key in swift_keys.ENVIRONMENT}
    model_kwargs = settings.get("model_kwargs")
    if model_kwargs is not None and isinstance(model_kwargs.value, Mapping):
        variables |= {key.upper(): replace(model_kwargs, value=value) for key, value in model_kwargs.value.items()}
        del settings["model_kwargs"]
    return replace(source, settings={**variables, **settings}), names


def _version(source: Source, names: Mapping[str, str], wanted: str | None) -> tuple[str, str]:
    """The version to take defaults of, and the reason."""
    if wanted is not None:
        return wanted, "--source-version"
    pinned = source.hints.get("ms-swift") or source.hints.get("ms_swift") or source.hints.get("swift")
    if pinned:
        return pinned, "pinned in the file"
    for key, version in swift_keys.VERSION_OF.items():
        if key in {name.rpartition(".")[2] for name in names.values()} | source.settings.keys():
            return (
                version,
                f"the last that knows {key}" if version != swift_keys.NEWEST else f"assumed: {key} is of 4.0 or later",
            )
    return swift_keys.NEWEST, "assumed"


def older(version: str, than: str) -> bool:
    """True if a version comes before another; ConfigError where it is no version."""
    numbers = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, than)]
    if not numbers[0]:
        raise ConfigError(f"{version!r} is no version", where="--source-version", fix="Example: 3.8.")
    return numbers[0] < numbers[1]


def _defaults(version: str, megatron: bool) -> dict[str, Any]:
    """The defaults of a version."""
    defaults = dict(swift_keys.DEFAULTS)
    for before, values in swift_keys.OLDER:
        defaults |= values if older(version, before) else {}
    return {**defaults, **(swift_keys.MEGATRON if megatron else {})}


def _refuse(to: Translation) -> None:
    """ConfigError for a way of training that is not read."""
    kind = to.value("rlhf_type", "dpo")
    if kind != "grpo":
        what = (
            f"rlhf_type {kind} is not GRPO"
            if to.given("rlhf_type")
            else "no rlhf_type: grpo, and swift's default is dpo"
        )
        raise ConfigError(what, where=to.where("rlhf_type"), fix="Only rlhf_type grpo is read.")
    for key, what in swift_keys.REFUSED.items():
        if to.given(key) and to.value(key):
            raise ConfigError(f"{what}: not read", where=to.where(key), fix="Import a configuration without it.")
    for key, legal in (("advantage_estimator", ("grpo",)), ("loss_type", tuple(swift_run.LOSSES))):
        if to.value(key) not in legal:
            what = f"{to.value(key)} is not in TRL's GRPO"
            raise ConfigError(what, where=to.where(key), fix=f"Legal: {', '.join(legal)}.")


def batch(to: Translation, megatron: bool, version: str) -> None:
    """The six numbers, by swift's arithmetic or Megatron's; ConfigError where it would stop as well."""
    world, keys = _processes(to, megatron)
    group = to.number("num_generations")
    if megatron:
        split = [f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context")]
        shared, micro = math.prod(to.number(key) for key in split), to.number("micro_batch_size")
        completions = to.number("global_batch_size")
        rollout = to.number("generation_batch_size") or completions * to.number("steps_per_generation")
        keys += ["global_batch_size", "micro_batch_size", *split]
        note = "steps_per_generation counts global batches"
    else:
        shared, micro = to.number("sequence_parallel_size"), to.number("per_device_train_batch_size")
        steps = to.number("gradient_accumulation_steps") or max(1, math.ceil(16 / micro / world))
        completions = micro * world * steps
        per_rollout = to.number("steps_per_generation") or (1 if older(version, "3.3") else steps)
        rollout = to.number("generation_batch_size") or micro * world * per_rollout
        keys += ["per_device_train_batch_size", "gradient_accumulation_steps", "sequence_parallel_size"]
        note = f"{micro} x {world} processes x {steps}"
    if world % shared:
        what = f"{world} processes cannot share each sequence in groups of {shared}"
        raise ConfigError(
            what, where=to.source.path.name, fix="Give the number of processes with --env NPROC_PER_NODE=N."
        )
    if rollout % group:
        what = f"the {rollout} completions of a rollout are not whole groups of {group}"
        raise ConfigError(what, where=to.where("num_generations"), fix="swift refuses it, too: choose a divisor.")
    six = SixNumbers(group, rollout // group, completions, to.number("num_iterations"), world // shared, micro)
    keys += ["num_generations", "steps_per_generation", "generation_batch_size", "num_iterations"]
    to.set_batch(six, [key for key in dict.fromkeys(keys) if to.given(key)] or ["per_device_train_batch_size"], note)


def _processes(to: Translation, megatron: bool) -> tuple[int, list[str]]:
    """Processes that train, and the settings that say so."""
    if to.given("train.gpus"):
        return to.number("train.gpus"), ["train.gpus"]
    if (launched := accelerate.processes(to)) is not None:
        return launched, []
    devices = [key for key in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES") if to.given(key)]
    for key in devices:
        alone = not to.given("NPROC_PER_NODE") and "," in str(to.value(key))
        to.speed(key, "one process: the model is spread over these GPUs" if alone else "GPUs of the trainer")
    torchrun = [to.source.launch[key].value for key in ("nproc_per_node", "nnodes") if key in to.source.launch]
    if torchrun and all(isinstance(count, int) for count in torchrun):
        return math.prod(torchrun), []
    keys = [key for key in ("NPROC_PER_NODE", "NNODES") if to.given(key)]
    return math.prod(to.number(key) for key in keys), keys


def _sharding(to: Translation, megatron: bool) -> None:
    """DeepSpeed, FSDP and accelerate; Megatron's distributed optimizer."""
    adapter = to.value("tuner_type") != "full"
    named = to.value("deepspeed")
    if named:
        deepspeed.apply(to, "deepspeed", ZERO.get(named, named) if isinstance(named, str) else named, adapter=adapter)
    if fsdp := to.value("fsdp"):
        deepspeed_free = FSDP2 if fsdp == "fsdp2" else {}
        accelerate.fully_sharded(to, "fsdp", deepspeed_free)
    accelerate.apply(to, adapter=adapter)
    if megatron and not adapter:
        note = "Megatron keeps 32-bit weights beside the bfloat16 ones"
        to.converted("use_distributed_optimizer", deepspeed.master_weights(to), note)


def _rest(to: Translation) -> None:
    """Verdicts of keys that no function gave one: by table, and TRL's own under their name."""
    for key in [key for key in to.source.settings if key not in to.rows]:
        value, target = to.value(key), swift_keys.SAME.get(key)
        foreign = grpo_keys().get(key)
        if target is not None:
            to.same(key, target)
        elif value in (None, False, [], "") and key not in grpo_keys():
            to.inert(key, "off")
        elif key in swift_keys.INERT:
            to.inert(key, swift_keys.INERT[key] or "no effect on the run")
        elif key in swift_keys.SPEED:
            to.speed(key, swift_keys.SPEED[key] or "no effect on what is learned")
        elif key in swift_keys.DROPPED:
            to.dropped(key, swift_keys.DROPPED[key] or "no such key")
        elif key.startswith(swift_keys.IGNORED):
            to.inert(key, "goes with what was said above, or with a service")
        elif foreign is not None and foreign.allows(value) and not key.startswith("vllm_"):
            to.same(key, f"grpo.{key}")
